"""The line of a replay: its position and speed, and a slider with the markers."""

from rlhf_tui import format as fmt
from rlhf_tui.state.feeds.updates import ReplayMark, ReplayStatus
from rlhf_tui.state.timeline import MARKER_GLYPHS, MARKER_TONES
from rlhf_tui.widgets.lines import Piece, Row, row_width
from rlhf_tui.widgets.panels.panel import BAR, REST, Panel

LEAST_SLIDER = 10
"""Cells below which the slider is left out."""
ORDER = ("attempt", "note", "command", "alert", "crash")
"""Kinds of markers; the last one of those in a cell is visible."""
HEAD = "●"


class ReplayLine(Panel):
    """One line. Empty for a session that is shown as it is now."""

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
        return [[*row, *(slider(status, room) if room >= LEAST_SLIDER else [])]]


def speed_text(speed: float) -> str:
    """`20×`, `0.5×`, `5,000×`."""
    return f"{speed:,.0f}×" if speed >= 10 else f"{speed:.3g}×"


def slider(status: ReplayStatus, width: int) -> list[Piece]:
    """The markers and the place of the replay on a line of `width` cells."""
    head = _cell(status.share, width)
    marks: dict[int, ReplayMark] = {}
    for mark in status.marks:
        at = _cell(mark.share, width)
        if at not in marks or ORDER.index(mark.kind) >= ORDER.index(marks[at].kind):
            marks[at] = mark
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
