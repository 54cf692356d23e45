"""One run, as scripts and notebooks see it: read it, wait for it, steer it.

Every read opens the journal anew, so a session may be used in several threads, during the run and
after it, and while others watch and steer the same run.
"""

import difflib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from engine.api.curve import Curve, aligned, as_curve
from engine.config.file import as_mapping
from engine.config.schema import RunConfig
from engine.config.settings import settings_of
from engine.errors import (
    CommandRejectedError,
    NoSuchSessionError,
    SessionError,
    UserInputError,
)
from engine.journal.notes import add_note
from engine.journal.reader import JournalReader
from engine.journal.rows import CheckpointRow, CommandRow, EventRow, ProbeResult, SampleRow
from engine.journal.samples import SampleQuery, SampleReader, with_judgements
from engine.metrics import METRICS
from engine.protocol.client import Client
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Note,
    Pause,
    Probe,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    Undo,
    Unpause,
)
from engine.session import folder as session_folder
from engine.session.access import current_user

T = TypeVar("T")

POLL_INTERVAL = 0.2
"""Seconds between two evaluations of a condition that is waited for."""


def default_operator() -> str:
    """Who steers if a script does not say it: `ana in Python`."""
    return f"{current_user()} in Python"


class Session:
    """A run in its folder, live or ended."""

    def __init__(self, folder: str | Path, *, who: str | None = None) -> None:
        """Opens a session by its folder, such as `sessions/demo`.

        Args:
            folder: the session's; it must exist.
            who: the name under which the journal records the commands sent by this object.
                Default: this user, `in Python`.

        Raises:
            NoSuchSessionError: there is no session in that folder.
            SessionError: this user cannot read the folder.
        """
        self._files = session_folder.Session(Path(folder).resolve())
        try:
            exists = self._files.config_file.is_file()
        except OSError as error:
            raise SessionError(f"cannot read {self.folder}: {error.strerror}") from error
        if not exists:
            raise NoSuchSessionError(f"there is no session in {self.folder}")
        self.who = default_operator() if who is None else who

    def __repr__(self) -> str:
        return f"Session({str(self.folder)!r})"

    # -- what it is ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The session's name."""
        return self._files.name

    @property
    def folder(self) -> Path:
        """The session's folder, an absolute path."""
        return self._files.folder

    @property
    def files(self) -> session_folder.Session:
        """The paths in the folder, and its lock."""
        return self._files

    @property
    def is_live(self) -> bool:
        """Whether an engine runs it."""
        return self._files.is_live()

    @property
    def state(self) -> str:
        """One of :data:`engine.session.states.STATES`, or `crashed`: live, but without engine."""
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
        """The settings in force, by name: what :meth:`set` changes.

        Before the first step, those of the configuration.
        """
        configured = as_mapping(settings_of(self.config()))
        with self._reader() as reader:
            return configured | (reader.meta().settings or {})

    # -- what it has recorded --------------------------------------------------------------------

    def metric_names(self) -> list[str]:
        """The names of the metrics that the run has recorded."""
        with self._reader() as reader:
            return reader.metric_names()

    def metric(self, name: str) -> float:
        """The newest value of a metric.

        NaN if there is none yet: a condition such as `run.metric("objective/kl") > 6` is then
        false.

        Raises:
            UserInputError: there is no such metric.
        """
        with self._reader() as reader:
            newest = reader.newest_value(name)
            if newest is None:
                _check_metric(name, reader.metric_names())
                return math.nan
            return newest[1]

    def curve(self, name: str, after: int = -1) -> Curve:
        """One metric of the current timeline.

        Args:
            name: of the metric, see docs/metrics.md.
            after: only later steps. Step 0 has the evaluation before the first step.

        Raises:
            UserInputError: there is no such metric.
        """
        with self._reader() as reader:
            points = reader.series(name, after)
            if not points:
                _check_metric(name, reader.metric_names())
        return as_curve(name, points)

    def as_arrays(self, *names: str, after: int = -1) -> dict[str, Any]:
        """Several metrics over the same steps; all that the run has recorded by default.

        Returns:
            `step` and each name, each an array of the standard library of the same length, which
            `numpy.asarray` converts without a copy. NaN where a metric has no value at a step.
            `pandas.DataFrame` takes the whole mapping.

        Raises:
            UserInputError: there is no such metric.
        """
        chosen = names or tuple(self.metric_names())
        return dict(aligned([self.curve(name, after) for name in chosen]))

    def samples(
        self, last: int | None = None, *, query: SampleQuery | None = None
    ) -> list[SampleRow]:
        """Recorded responses with their judgements.

        Args:
            last: at most as many; all by default.
            query: without one, the newest responses of the current timeline, the newest last. With
                one, the first of those that it selects, in its order.
        """
        with SampleReader(self._files) as reader:
            if query is not None:
                return reader.page(query, -1 if last is None else last)
            return with_judgements(self._files, reader.newest(last))

    def events(self, last: int | None = None, *, after: int = 0) -> list[EventRow]:
        """The log of the run, oldest first: states, commands, alerts, checkpoints, notes, errors.

        Args:
            last: the newest ones, at most as many; all by default.
            after: only events with a greater number (`EventRow.event`).
        """
        with self._reader() as reader:
            return reader.events(last, after)

    def commands(self) -> list[CommandRow]:
        """Every command with who sent it, its status and what it changed, in order of arrival."""
        with self._reader() as reader:
            return reader.commands()

    def checkpoints(self) -> list[CheckpointRow]:
        """The complete checkpoints of the current timeline, by step."""
        with self._reader() as reader:
            return reader.checkpoints(("complete",))

    def _reader(self) -> JournalReader:
        return JournalReader(self._files)

    # -- waiting ---------------------------------------------------------------------------------

    def wait(self, condition: "Callable[[Session], T]", timeout: float | None = None) -> T:
        """Waits until a condition holds: `run.wait(lambda run: run.metric("objective/kl") > 6)`.

        Args:
            condition: called with this session, several times a second.
            timeout: seconds; None for as long as the run lives.

        Returns:
            What the condition returned.

        Raises:
            TimeoutError: it did not hold in time.
            SessionError: the run has ended, and it does not hold.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            live = self.is_live  # before the condition, which then sees the last rows
            if value := condition(self):
                return value
            if not live:
                raise SessionError(
                    f"{self._where()}, and what is waited for cannot happen any more"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._where()}; waited for {timeout:g} s")
            time.sleep(POLL_INTERVAL)

    def _where(self) -> str:
        return f"session '{self.name}' is {self.state} at step {self.step}"

    def wait_for_step(self, step: int, timeout: float | None = None) -> int:
        """Waits until a step is completed, and returns the last completed one.

        Raises:
            TimeoutError: it is not completed in time.
            SessionError: the run has ended before it.
        """
        return self.wait(lambda run: run.step if run.step >= step else 0, timeout)

    def wait_for_end(self, timeout: float | None = None) -> str:
        """Waits until the engine has exited, and returns the state: `finished`, `failed` and so on.

        The session can then be resumed, forked or deleted.

        Raises:
            TimeoutError: it has not exited in time.
        """
        return self.wait(lambda run: "" if run.is_live else run.state, timeout)

    # -- steering --------------------------------------------------------------------------------

    def send(self, command: AnyCommand, timeout: float | None = None) -> CommandReply:
        """Sends a command and waits until it is applied; the methods below do so.

        Commands take effect between two steps, so this takes up to a step.

        Args:
            command: one of :mod:`engine.protocol.commands`.
            timeout: seconds to wait; None for as long as it takes, 0 to return as soon as the
                engine has accepted it.

        Returns:
            The engine's reply: its status, the first step with the command in effect, and the
            settings that it changed.

        Raises:
            CommandRejectedError: the engine has rejected it; the message has the reason.
            NoSuchSessionError: the session has no live engine on this machine.
            LinkError: the engine does not reply, or has gone.
            SessionError: the session belongs to another user.
            TimeoutError: it is not applied in time. It stays pending.
        """
        with Client(self._files, self.who) as client:
            reply = client.send(command)
            if timeout != 0 and not reply.final:
                try:
                    reply = client.wait(reply.id, timeout)
                except TimeoutError as error:
                    raise TimeoutError(
                        f"'{command.name()}' is not applied within {timeout:g} s; it stays pending"
                    ) from error
        if reply.status == "rejected":
            raise CommandRejectedError(reply.reason)
        return reply

    def pause(self, timeout: float | None = None) -> CommandReply:
        """Pauses the run at the next step boundary. Raises as :meth:`send`."""
        return self.send(Pause(), timeout)

    def unpause(self, timeout: float | None = None) -> CommandReply:
        """Ends a pause. Raises as :meth:`send`."""
        return self.send(Unpause(), timeout)

    def set(self, key: str, value: Any, timeout: float | None = None) -> CommandReply:
        """Changes a setting, by its name or its configuration key: `run.set("epochs", 2)`.

        Raises as :meth:`send`.
        """
        return self.send(SetSetting(key=key, value=value), timeout)

    def set_beta(self, value: float, timeout: float | None = None) -> CommandReply:
        """Sets beta, the KL coefficient; an adaptive controller continues from it.

        Raises as :meth:`send`.
        """
        return self.send(SetBeta(value=value), timeout)

    def set_kl(
        self,
        controller: Literal["fixed", "adaptive"],
        *,
        target: float | None = None,
        horizon: float | None = None,
        timeout: float | None = None,
    ) -> CommandReply:
        """Chooses the KL controller; what is None does not change. Raises as :meth:`send`.

        Args:
            controller: `fixed` or `adaptive`.
            target: KL in nats per response.
            horizon: of the controller, in episodes.
            timeout: as for :meth:`send`.
        """
        command = SetKLController(controller=controller, target=target, horizon=horizon)
        return self.send(command, timeout)

    def undo(self, timeout: float | None = None) -> CommandReply:
        """Reverts the last change of settings by an operator. Raises as :meth:`send`."""
        return self.send(Undo(), timeout)

    def checkpoint(self, timeout: float | None = None) -> CommandReply:
        """Saves a checkpoint at the next step boundary. Raises as :meth:`send`."""
        return self.send(Checkpoint(), timeout)

    def rollback(
        self, step: int, *, reseed: bool = False, timeout: float | None = None
    ) -> CommandReply:
        """Returns to the checkpoint of a step; what followed becomes an abandoned branch.

        Raises as :meth:`send`.

        Args:
            step: of one of :meth:`checkpoints`.
            reseed: whether to sample other responses than before.
            timeout: as for :meth:`send`.
        """
        return self.send(Rollback(step=step, reseed=reseed), timeout)

    def stop(self, *, now: bool = False, timeout: float | None = None) -> CommandReply:
        """Finishes the step, saves a checkpoint and stops; with `now` at once, without saving.

        Raises as :meth:`send`. The engine has exited after :meth:`wait_for_end`.
        """
        return self.send(Stop(now=now), timeout)

    def probe(self, prompt: str, timeout: float | None = None) -> ProbeResult:
        """Responses of the policy and of the reference to a prompt. Raises as :meth:`send`."""
        if timeout == 0:
            raise UserInputError("a probe has its result once it is applied: give a longer timeout")
        return ProbeResult.of(self.send(Probe(text=prompt), timeout).result)

    def note(self, text: str) -> int:
        """Adds a note to the journal, also of a run that has ended.

        Returns:
            The last completed step, at which the note stands.

        Raises:
            CommandRejectedError: the text is empty or too long.
            SessionError: the session belongs to another user, or cannot be written.
            LinkError: the engine does not reply.
        """
        if not self.is_live:
            return add_note(self._files, text, self.who)
        reply = self.send(Note(text=text))
        return (reply.step or 1) - 1  # the reply has the next step


def _check_metric(name: str, recorded: list[str]) -> None:
    """Raises UserInputError if a run has no such metric, and never will have."""
    declared = [metric.name for metric in METRICS]
    if name in recorded or name in declared or not recorded:
        return
    close = difflib.get_close_matches(name, [*recorded, *declared], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; it has {', '.join(recorded)}"
    raise UserInputError(f"there is no metric '{name}'{hint}")
