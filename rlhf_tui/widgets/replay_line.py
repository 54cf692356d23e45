"""The line of a replay: its position and speed, and a slider with the markers."""

from collections.abc import Iterable, Mapping

from rlhf_tui import format as fmt
from rlhf_tui.state.feeds.updates import ReplayMark
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, MARKER_TONES
from rlhf_tui.widgets.lines import Piece, Row, row_width
from rlhf_tui.widgets.panels.panel import BAR, REST, Panel

MIN_SLIDER_WIDTH = 10
"""Cells below which the slider is left out."""
MARKER_PRIORITY = ("attempt", "note", "command", "alert", "crash")
"""Kinds of markers; the last one of those in a cell is visible."""
HEAD = "●"


class ReplayLine(Panel):
    """One line. Empty for a session that is shown as it is now."""

    def __init__(self, state: SessionState, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(state, id=id)
        self._marks: tuple[ReplayMark, ...] = ()
        self._width = 0
        self._visible: dict[int, ReplayMark] = {}
        """The markers in the cells of a slider: :func:`visible_marks` of these marks and width."""

    def rows(self, width: int, height: int) -> list[Row]:
        """The position in words, then the slider in the remaining room."""
        status = self.state.replay
        if status is None:
            return [[(" replay: reading the session …", "dim")]]
        row: list[Piece] = [
            (" ▶ " if status.playing else " ‖ ", "good" if status.playing else "warn"),
            ("replay", "strong"), (", step ", "dim"), (f"{status.position.step:,}", "strong"),
            (f" of {status.last_step:,}, ", "dim"), (speed_text(status.speed), "strong"),
            (f"  {fmt.clock(status.position.time)}  ", "dim"),
        ]  # fmt: skip
        room = width - row_width(row) - 1
        if room < MIN_SLIDER_WIDTH:
            return [row]
        if status.marks is not self._marks or room != self._width:
            # Once for a recording, which can have thousands of them; the line moves often.
            self._marks, self._width = status.marks, room
            self._visible = visible_marks(status.marks, room)
        return [[*row, *slider(status.share, self._visible, room)]]


def speed_text(speed: float) -> str:
    """`20×`, `0.5×`, `5,000×`."""
    return f"{speed:,.0f}×" if speed >= 10 else f"{speed:.3g}×"


def visible_marks(marks: Iterable[ReplayMark], width: int) -> dict[int, ReplayMark]:
    """The markers that are visible in the cells of a line of `width` cells."""
    visible: dict[int, ReplayMark] = {}
    for mark in marks:
        at = _cell(mark.share, width)
        if at not in visible or MARKER_PRIORITY.index(mark.kind) >= MARKER_PRIORITY.index(
            visible[at].kind
        ):
            visible[at] = mark
    return visible


def slider(share: float, marks: Mapping[int, ReplayMark], width: int) -> list[Piece]:
    """The markers in their cells, and the place of the replay, on a line of `width` cells."""
    head = _cell(share, width)
    pieces: list[Piece] = []
    for x in range(width):
        if x == head:
            pieces.append((HEAD, "strong"))
        elif (found := marks.get(x)) is not None:
            pieces.append((MARKER_GLYPHS[found.kind], MARKER_TONES[found.kind]))
        else:
            pieces.append((BAR, "accent") if x < head else (REST, "dim"))
    return pieces


def _cell(share: float, width: int) -> int:
    return min(int(share * width), width - 1)
