"""Reads what a run has recorded, for scripts and notebooks.

Every read opens the journal again, so a session may be used from several threads, during the run
and after it.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from engine.api.curve import Curve, aligned, as_curve
from engine.config.schema import RunConfig
from engine.config.settings import settings_of
from engine.errors import NoSuchSessionError, SessionError, UserInputError
from engine.journal.reader import JournalReader
from engine.journal.rows import CheckpointRow, CommandRow, EventRow, SampleRow
from engine.journal.samples import SampleQuery, SampleReader, with_judgements
from engine.metrics import METRICS, nearest
from engine.session import folder as session_folder


class SessionReader:
    """Read access to a run in its folder, live or ended."""

    def __init__(self, folder: str | Path) -> None:
        """Opens a session by its folder, such as `sessions/demo`.

        Raises:
            NoSuchSessionError: there is no session in that folder.
            SessionError: this user cannot read the folder.
        """
        self._files = session_folder.SessionFolder(Path(folder).resolve())
        self._check_exists()

    def _check_exists(self) -> None:
        """Checks the folder: a missing one would read as a run that crashed before its first step.

        Raises NoSuchSessionError or SessionError.
        """
        try:
            exists = self._files.config_file.is_file()
        except OSError as error:
            raise SessionError(f"cannot read {self.folder}: {error.strerror}") from error
        if not exists:
            raise NoSuchSessionError(f"there is no session in {self.folder}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    # -- identity and state ----------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The session's name."""
        return self._files.name

    @property
    def folder(self) -> Path:
        """The session's folder, an absolute path."""
        return self._files.folder

    @property
    def files(self) -> session_folder.SessionFolder:
        """The paths in the folder, and its lock."""
        return self._files

    @property
    def is_live(self) -> bool:
        """Whether an engine is running the session. Raises SessionError if that is unknown."""
        return self._files.is_live()

    @property
    def state(self) -> str:
        """One of :data:`engine.session.states.STATES`, or `crashed`: live but without an engine."""
        with self._reader() as reader:
            return reader.state()

    @property
    def message(self) -> str:
        """The reason for the state, such as an error or what paused the run; may be empty."""
        with self._reader() as reader:
            meta = reader.meta()
        return meta.pause_reason or meta.message

    @property
    def step(self) -> int:
        """The last completed step; 0 before the first."""
        with self._reader() as reader:
            return reader.last_step()

    def config(self) -> RunConfig:
        """The configuration that the run was started with. Raises ConfigError."""
        return self._files.config()

    def settings(self) -> dict[str, Any]:
        """The settings in force, by name: those that :meth:`set` changes.

        Before the first step, they are those of the configuration.
        """
        configured = msgspec.structs.asdict(settings_of(self.config()))
        with self._reader() as reader:
            return configured | reader.settings_after_last_step()

    # -- recorded data ---------------------------------------------------------------------------

    def metric_names(self) -> list[str]:
        """The names of the metrics that the run has recorded."""
        with self._reader() as reader:
            return reader.metrics.names()

    def metric(self, name: str) -> float:
        """The newest value of a metric; NaN if there is none yet.

        A condition such as `run.metric("objective/kl") > 6` is then false.

        Raises:
            UserInputError: there is no such metric.
        """
        with self._reader() as reader:
            newest = reader.metrics.newest_value(name)
            if newest is None:
                _check_metric(name, reader.metrics.names())
                return math.nan
            return newest[1]

    def curve(self, name: str, after: int = -1) -> Curve:
        """One metric of the current timeline.

        Args:
            name: of the metric, see docs/metrics.md.
            after: return only later steps. Step 0 is the evaluation before the first step.

        Raises:
            UserInputError: there is no such metric.
        """
        with self._reader() as reader:
            points = reader.metrics.series(name, after)
            if not points:
                _check_metric(name, reader.metrics.names())
        return as_curve(name, points)

    def as_arrays(self, *names: str, after: int = -1) -> dict[str, Any]:
        """Several metrics over the same steps; by default all that the run has recorded.

        Returns:
            `step` and each name → an `array.array`, all of the same length, which `numpy.asarray`
            converts without a copy. NaN where a metric has no value at a step.
            `pandas.DataFrame` takes the whole mapping.

        Raises:
            UserInputError: there is no such metric.
        """
        with self._reader() as reader:
            known = reader.metrics.names()
            # A step that ends meanwhile would appear only in the curves that are read later.
            last = reader.last_step()
            curves = []
            for name in names or known:
                points = reader.metrics.series(name, after, last)
                if not points:
                    _check_metric(name, known)
                curves.append(as_curve(name, points))
        return dict(aligned(curves))

    def samples(
        self, last: int | None = None, *, query: SampleQuery | None = None
    ) -> list[SampleRow]:
        """Recorded responses with their judgements.

        Args:
            last: maximum number of responses; all by default.
            query: selects and orders the responses; the first `last` of them are returned. Without
                one: the newest responses of the current timeline, the newest last.
        """
        self._check_exists()
        with SampleReader(self._files) as reader:
            if query is not None:
                return reader.page(query, -1 if last is None else last)
            return list(with_judgements(self._files, reader.iter_newest(last)))

    def events(self, last: int | None = None, *, after: int = 0) -> list[EventRow]:
        """The log of the run, oldest first: states, commands, alerts, checkpoints, notes, errors.

        Args:
            last: maximum number of events, the newest ones; all by default.
            after: only events with a greater number (`EventRow.event`).
        """
        with self._reader() as reader:
            return reader.events(last, after)

    def commands(self) -> list[CommandRow]:
        """Every command with its sender, its status and its changes, in order of arrival."""
        with self._reader() as reader:
            return reader.commands()

    def checkpoints(self) -> list[CheckpointRow]:
        """The complete checkpoints of the current timeline, by step."""
        with self._reader() as reader:
            return reader.checkpoints(("complete",))

    def _reader(self) -> JournalReader:
        self._check_exists()
        return JournalReader(self._files)


def _check_metric(name: str, recorded: list[str]) -> None:
    """Raises UserInputError if the run has no such metric and never will."""
    declared = [metric.name for metric in METRICS]
    if name in recorded or name in declared or not recorded:
        return
    near = nearest(name, [*declared, *recorded])
    hint = f"did you mean '{near}'?" if near else f"it has {', '.join(recorded)}"
    raise UserInputError(f"there is no metric '{name}'; {hint}")
