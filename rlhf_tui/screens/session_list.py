"""The list of the sessions screen: reads the folder, and makes rows and columns of it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType

from engine import metrics
from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.session.folder import Session, all_sessions
from rlhf_tui import format as fmt
from rlhf_tui.state.feed import file_id
from rlhf_tui.state.session_row import (
    ListedSession,
    SessionRow,
    read_session_row,
    unreadable_row,
)
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.status_lines import STATE_MARKS, paused_text
from rlhf_tui.widgets.table import Column, Table

NAME = 1
"""The index of the column of names."""
LEAST_WITH_KL = 94
"""Width of the table from which on it has a column of the KL."""
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 12
SPARK_STEPS = 400
"""Newest steps that a sparkline shows."""

LEAST = float("-inf")
"""Sorts before all values."""
ORDERS: dict[str, Callable[[SessionRow], float | str]] = {
    "name": lambda row: row.name,
    "state": lambda row: row.state,
    "step": lambda row: row.step,
    "beta": lambda row: LEAST if row.beta is None else row.beta,
    "score": lambda row: LEAST if row.score is None else row.score,
    "KL": lambda row: LEAST if row.kl is None else row.kl,
    "active": lambda row: row.updated or 0,
}
"""Title of a column → what it sorts by."""
ASCENDING = ("name", "state")
"""The titles that first sort in ascending order, the others in descending order."""


def spark(values: list[float], width: int = SPARK_WIDTH) -> str:
    """A sparkline of `width` blocks; each one is the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(int((m - low) / span * len(SPARKS)), len(SPARKS) - 1)] for m in means)


def listed_session(session: Session) -> ListedSession:
    """A session as the browser lists it; if it cannot be read, with the reason."""
    try:
        row = read_session_row(session)
        with JournalReader(session) as record:
            scores = record.series(metrics.SCORE, after=max(row.step - SPARK_STEPS, 0))
    except (RlhfError, OSError) as error:
        return ListedSession(row=unreadable_row(session, error))
    return ListedSession(row=row, spark=spark([v for _, v in scores if v is not None]))


class SessionListCache:
    """Keeps the rows of sessions; reads only those that have changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, ListedSession]] = {}

    def rows(self, root: Path) -> list[ListedSession]:
        """All sessions, those with an engine first, then the newest."""
        found = []
        for session in all_sessions(root):
            stamp = _stamp(session)
            known = self._known.get(session.folder)
            if known is None or known[0] != stamp:
                known = stamp, listed_session(session)
                self._known[session.folder] = known
            found.append(known[1])
        found.sort(key=lambda s: (s.row.pid is None, -(s.row.updated or 0), s.row.name))
        return found


def ordered(sessions: list[ListedSession], title: str, *, descending: bool) -> list[ListedSession]:
    """Sorts by the column with this title; "" keeps the order of :class:`SessionListCache`."""
    if title not in ORDERS:
        return sessions
    return sorted(sessions, key=lambda s: ORDERS[title](s.row), reverse=descending)


def _stamp(session: Session) -> object:
    files = (session.journal_file, session.journal_file.with_name("journal.db-wal"))
    times = []
    for path in files:
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:
            times.append(0)
    return file_id(session.journal_file), *times, session.is_live()


class Sessions(Table):
    """The table of sessions. Its enter key is shown in the line of keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "open")]


def sessions_table() -> Sessions:
    """The empty table."""
    return Sessions(
        [
            Column("", 1),
            Column("name", 14, flexible=True),
            Column("state", 9),
            Column("step", 11, right=True),
            Column("beta", 7, right=True),
            Column("score", 7, right=True),
            Column("KL", 7, right=True, least=LEAST_WITH_KL),
            Column("score curve", SPARK_WIDTH, least=78),
            Column("active", 8, right=True),
        ],
        id="sessions",
        empty=[[(" reading …", "dim")]],
    )


def cells_of(listed: ListedSession, now: float) -> list[Piece]:
    """The cells of a row, in the order of the columns; `now` is the wall clock."""
    row = listed.row
    mark, tone = STATE_MARKS.get(row.state, ("✗", "bad"))
    age = fmt.duration(now - row.updated) if row.updated else "–"
    steps = f"{row.step:,}/{row.total_steps:,}" if row.total_steps else "–"
    return [
        (mark, tone), (row.name, "strong"), (row.state, tone), (steps, ""),
        (fmt.number(row.beta, 4), ""), (fmt.number(row.score, 3), "strong"),
        (fmt.number(row.kl, 2), ""), (listed.spark, "s1"), (age, "dim"),
    ]  # fmt: skip


def short_path(path: str | Path) -> str:
    """A path with `~` for the home folder."""
    try:
        return str(Path("~") / Path(path).relative_to(Path.home()))
    except ValueError:
        return str(path)


def lines_about(row: SessionRow, width: int) -> list[Row]:
    """Folder, engine, checkpoints and the reason for the state of a session.

    The KL, too, if the table is too narrow for its column.
    """
    engine = f"engine pid {row.pid} on {row.host}" if row.pid else "no engine"
    steps = ", ".join(map(str, row.checkpoints[-6:])) or "none"
    facts: list[Piece] = [(" ", ""), (engine, "")]
    if width < LEAST_WITH_KL:
        facts += [("   KL ", "dim"), (fmt.number(row.kl, 2), "")]
    found: list[Row] = [
        [(f" {short_path(row.folder)}", "dim")],
        [*facts, ("   checkpoints ", "dim"), (steps, "")],
    ]
    if row.pause_reason:
        found.append([(f" {paused_text(row.pause_reason, row.step)}", "warn")])
    elif row.message:
        tone = "bad" if row.state in ("failed", "unreadable") else "dim"
        found.append([(f" {row.message}", tone)])
    elif row.state == "crashed":
        reason = "engine died (no exit message); resume: "
        found.append([(f" {reason}", "bad"), (f"rlhf-tui resume {row.name}", "key")])
    return found
