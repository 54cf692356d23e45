"""The list of the sessions screen: its columns, its orders, and the lines about a session."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual.binding import Binding, BindingType

from engine import metrics
from rlhf_tui import format as fmt
from rlhf_tui.format import value_text
from rlhf_tui.state.runs.differences import differing, short_names
from rlhf_tui.state.runs.listing import SPARK_WIDTH
from rlhf_tui.state.runs.session_row import ListedSession, SessionRow
from rlhf_tui.state.timeline import DIED
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.status_lines import STATE_MARKS, paused_text
from rlhf_tui.widgets.table import Column, Table, sortable

NAME_COLUMN = 1
"""The index of the column of names."""
MIN_WIDTH_WITH_KL = 94
"""Minimum width of the table for a KL column."""
MARK = "▸ "
"""Before the name of a marked session."""
MAX_SETTING_WIDTH = 18
"""Maximum cells of a settings column; of a path, the end is shown."""

Order = Callable[[ListedSession], Any]
ORDERS: dict[str, Order] = {
    "name": lambda s: s.row.name,
    "state": lambda s: s.row.state,
    "step": lambda s: s.row.step,
    "beta": lambda s: sortable(s.row.beta),
    "KL": lambda s: sortable(s.row.kl),
    "active": lambda s: s.row.updated or 0,
}
"""Title of a column that is always there → what it sorts by."""
ASCENDING = ("name", "state")
"""The titles that first sort in ascending order, the others in descending order."""


# -- columns ---------------------------------------------------------------------------------------


class SessionColumns:
    """Which columns the table has: the usual ones, or those of the settings that differ."""

    def __init__(self) -> None:
        """The usual columns, with the score."""
        self.metric = metrics.SCORE
        """The metric whose last value and sparkline are shown."""
        self.with_settings = False
        self._keys: dict[str, str] = {}
        """Configuration key → title of its column."""

    @property
    def title(self) -> str:
        """The title of the metric's column."""
        return metrics.title_of(self.metric)

    def fit(self, sessions: Sequence[ListedSession]) -> None:
        """Chooses the settings that differ among these sessions."""
        known = [s.settings for s in sessions if s.settings]
        self._keys = short_names(differing(known)) if self.with_settings and known else {}

    @property
    def keys(self) -> list[str]:
        """The configuration keys that have a column."""
        return list(self._keys)

    def orders(self) -> dict[str, Order]:
        """Title of a column → what it sorts by."""
        shown = ("name", "step") if self.with_settings else tuple(ORDERS)
        found = {name: ORDERS[name] for name in shown}
        found[self.title] = lambda s: sortable(s.value)
        for key, title in self._keys.items():
            found.setdefault(title, _by_setting(key))
        return found

    def columns(self, sessions: Collection[ListedSession]) -> list[Column]:
        """The columns, wide enough for the states, steps and settings of these sessions."""
        title = self.title
        # Numbers end where the curve begins.
        curve = Column(f" {title} curve"[: SPARK_WIDTH + 1], SPARK_WIDTH + 1, hidden_below=78)
        value = Column(title, max(7, min(len(title) + 1, SPARK_WIDTH)), right=True)
        head = [Column("", 1), Column("name", 14, flexible=True, both_ends=True)]
        if not self.with_settings:
            states = max((len(s.row.state) for s in sessions), default=0)
            # As wide as at the end of the run, so that no column moves meanwhile.
            steps = max((len(_steps(s.row, s.row.total_steps)) for s in sessions), default=0)
            return [
                *head, Column("state", max(states, 9)), Column("step", max(steps, 7), right=True),
                Column("beta", 7, right=True), value,
                Column("KL", 7, right=True, hidden_below=MIN_WIDTH_WITH_KL), curve,
                Column("active", 8, right=True),
            ]  # fmt: skip
        columns = [*head, Column("step", 9, right=True), value, curve]
        used = 60
        for key, name in self._keys.items():
            longest = max((len(_setting(s, key)) for s in sessions), default=0)
            width = min(max(longest, len(name) + 1), MAX_SETTING_WIDTH)
            used += width + 1
            columns.append(Column(name, width, right=True, hidden_below=used))
        return columns

    def cells(self, listed: ListedSession, now: float, *, marked: bool) -> list[Piece]:
        """The cells of a row, in the order of the columns; `now` is the wall clock."""
        row = listed.row
        state = "waiting" if row.waits_for else row.state
        mark, tone = STATE_MARKS.get(state, ("✗", "bad"))
        head = [(mark, tone), (MARK * marked + row.name, "strong")]
        value = (fmt.number(listed.value, 3), "strong")
        if self.with_settings:
            settings = [(_setting(listed, key), "") for key in self._keys]
            return [*head, (f"{row.step:,}", ""), value, (f" {listed.spark}", "s1"), *settings]
        age = fmt.duration(now - row.updated) if row.updated else "–"
        return [
            *head, (state, tone), (_steps(row, row.step), ""), (fmt.number(row.beta, 4), ""), value,
            (fmt.number(row.kl, 2), ""), (f" {listed.spark}", "s1"), (age, "dim"),
        ]  # fmt: skip


def _steps(row: SessionRow, done: int | None) -> str:
    return f"{done:,}/{row.total_steps:,}" if row.total_steps else "–"


def _by_setting(key: str) -> Order:
    """Sorts unset values first, then numbers, then texts."""

    def order(session: ListedSession) -> tuple[int, float, str]:
        value = session.settings.get(key)
        if isinstance(value, int | float):
            return 1, value, ""
        return (0, 0.0, "") if value is None else (2, 0.0, str(value))

    return order


def _setting(session: ListedSession, key: str) -> str:
    text = value_text(session.settings.get(key)) if session.settings else "–"
    return text if len(text) <= MAX_SETTING_WIDTH else f"…{text[1 - MAX_SETTING_WIDTH :]}"


class Sessions(Table):
    """The table of sessions. Its enter key is shown in the line of keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "open")]


def sessions_table(columns: list[Column]) -> Sessions:
    """The empty table."""
    return Sessions(columns, id="sessions", empty=[[(" reading …", "dim")]])


# -- the lines about a session ---------------------------------------------------------------------


def short_path(path: str | Path) -> str:
    """A path with `~` for the home folder."""
    try:
        return str(Path("~") / Path(path).relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere; no home is known
        return str(path)


def lines_about(row: SessionRow, width: int, resume: str) -> list[Row]:
    """Folder, engine, checkpoints and the reason for the state of a session.

    Includes the KL if the table is too narrow for its column. `resume` is the command for a session
    that has crashed.
    """
    engine = f"engine pid {row.pid} on {row.host}" if row.pid else "no engine"
    steps = ", ".join(map(str, row.checkpoints[-6:]))
    saved = f"at step {steps}" if steps else "none"
    facts: list[Piece] = [(" ", ""), (engine, "")]
    if width < MIN_WIDTH_WITH_KL:
        facts += [("   KL ", "dim"), (fmt.number(row.kl, 2), "")]
    found: list[Row] = [
        [(f" {short_path(row.folder)}", "dim")],
        [*facts, ("   checkpoints ", "dim"), (saved, "")],
    ]
    if row.waits_for:
        found.append([(f" waits for {row.waits_for}", "warn")])
    elif row.pause_reason:
        found.append([(f" {paused_text(row.pause_reason, row.step)}", "warn")])
    elif row.message:
        tone = "bad" if row.state in ("failed", "unreadable") else "dim"
        reason = row.message.replace(f" of {row.folder}", "")  # it is above
        found.append([(f" {reason}", tone)])
    elif row.state == "crashed":
        reason = f"{DIED}; resume: "
        found.append([(f" {reason}", "bad"), (resume, "key")])
    return found


def line_of_marks(marked: int) -> Row:
    """The line about what can be done with marked sessions."""
    return [
        (f" {fmt.plural(marked, 'session')} marked   ", "accent"), ("O", "key"),
        (" overlay on this one   ", "dim"), ("C", "key"), (" settings   ", "dim"),
        ("M", "key"), (" other marks", "dim"),
    ]  # fmt: skip
