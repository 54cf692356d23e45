"""Reads the list of the sessions of a folder. Does not import Textual, which loads meanwhile."""

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import msgspec

from engine import metrics
from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.session.file_signature import file_signature
from engine.session.folder import SessionFolder, all_sessions
from rlhf_tui.state.runs.differences import configuration_of
from rlhf_tui.state.runs.session_row import ListedSession, session_row, unreadable_row
from rlhf_tui.state.series import bounded, is_flat

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 12
SPARK_STEPS = 400
"""Newest steps that a sparkline shows."""


def spark(values: list[float], width: int = SPARK_WIDTH) -> str:
    """A sparkline of `width` blocks; each one is the mean of its share of the values."""
    if not values:
        return ""
    values = [bounded(value) for value in values]
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if is_flat(low, high):
        return SPARKS[0] * count
    top, span = len(SPARKS) - 1, high - low
    return "".join(SPARKS[min(int((m - low) / span * len(SPARKS)), top)] for m in means)


def listed_session(session: SessionFolder, metric: str) -> ListedSession:
    """A session as the browser lists it; if it cannot be read, with the reason.

    Args:
        session: the session to read.
        metric: the metric whose last and newest values are listed.
    """
    try:
        with JournalReader(session) as reader:
            row = session_row(session, reader)
            points = reader.metrics.series(metric, after=max(row.step - SPARK_STEPS, 0))
            names = reader.metrics.names()
            attempts = reader.attempts()
    except (RlhfError, OSError) as error:
        return ListedSession(row=unreadable_row(session, error))
    values = [value for _, value in points if value is not None]
    return ListedSession(
        row=row,
        started=attempts[-1].started if attempts else 0.0,
        spark=spark(values),
        value=values[-1] if values else None,
        metrics=tuple(names),
    )


class SessionListCache:
    """Caches the rows of sessions; reads only those that have changed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[object, ListedSession]] = {}
        self._configurations: dict[Path, tuple[object, dict[str, Any]]] = {}

    def rows(
        self, root: Path, metric: str = metrics.SCORE, *, settings: bool = False
    ) -> list[ListedSession]:
        """All sessions: those with an engine, the last started first; then the last active first.

        Args:
            root: the folder of sessions.
            metric: the metric whose values are listed.
            settings: whether to read configurations, which takes some ten milliseconds each.
        """
        with self._lock:
            found = [self._row(s, metric, settings=settings) for s in all_sessions(root)]
        return sorted(found, key=_place)

    def begin(self, root: Path, metric: str) -> None:
        """Starts to read in a thread; :meth:`rows` waits for it."""

        def read() -> None:
            with contextlib.suppress(OSError, RlhfError):  # raised to whoever asks for the rows
                self.rows(root, metric)

        threading.Thread(target=read, daemon=True, name="listing").start()

    def _row(self, session: SessionFolder, metric: str, *, settings: bool) -> ListedSession:
        changed = _signature(session), metric
        known = self._known.get(session.folder)
        if known is None or known[0] != changed:
            known = changed, listed_session(session, metric)
            self._known[session.folder] = known
        if not settings:
            return known[1]
        return msgspec.structs.replace(known[1], settings=self._settings(session, known[1]))

    def _settings(self, session: SessionFolder, listed: ListedSession) -> dict[str, Any]:
        changed = file_signature(session.config_file), listed.row.settings
        known = self._configurations.get(session.folder)
        if known is None or known[0] != changed:
            try:
                known = changed, configuration_of(session)
            except (RlhfError, OSError):
                known = changed, {}  # the row says what is wrong, or opening the session does
            self._configurations[session.folder] = known
        return known[1]


def _place(listed: ListedSession) -> tuple[bool, float, str]:
    row = listed.row
    # By its last step a live session would change places with another at every step.
    time = listed.started if row.pid is not None else row.updated or 0.0
    return row.pid is None, -time, row.name


def _signature(session: SessionFolder) -> object:
    journal = session.journal_file
    files = (journal, journal.with_name("journal.db-wal"), session.config_file)
    return *map(file_signature, files), session.may_be_live()
