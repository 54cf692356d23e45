"""The timeline: what happened, newest first. Its entries can be selected and opened."""

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from rlhf_tui import format as fmt
from rlhf_tui.state.messages import RowHighlighted, RowSelected
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, MARKER_TONES, Marker, in_app, sender
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.lines import Row, justified, row_width
from rlhf_tui.widgets.panels.panel import heading
from rlhf_tui.widgets.scroll_list import ScrollList

WITH_CLOCK = 60
"""Minimum cells for each entry to have its time of day."""
MIN_STEP_WIDTH = 3
"""Minimum cells of a step."""
MAX_STEPS = 20
"""Maximum number of an entry's checkpoints whose steps are listed, the newest."""


class TimelinePanel(ScrollList):
    """One line per entry. Posts :class:`RowHighlighted` and :class:`RowSelected` with its key.

    Checkpoints with nothing between them are one entry; its key is that of the newest.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "open", show=False)]
    read_only = False

    def __init__(self, state: SessionState, view: Viewport) -> None:
        """`view` has the selected entry, which the charts share."""
        super().__init__(id="timeline")
        self.state, self.view = state, view
        self._entries: list[list[Marker]] = []
        self._step_width = MIN_STEP_WIDTH

    def read(self, state: SessionState, view: Viewport) -> None:
        """Shows another state, or another selection."""
        self.state, self.view = state, view
        self.update()

    def entries(self) -> list[list[Marker]]:
        """The entries, newest first: each is a marker, or several checkpoints, oldest first."""
        entries = self.state.timeline.folded()
        if self._entries is not entries:
            self._entries = entries
            self._step_width = max([MIN_STEP_WIDTH, *(len(str(e[-1].step)) for e in entries)])
        return entries

    def _selected(self) -> int | None:
        """The index of the entry with the selected marker."""
        selected = self.view.selected
        if selected is None:
            return None
        found = (i for i, e in enumerate(self.entries()) if any(m.key == selected for m in e))
        return next(found, None)

    # -- the list ------------------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The heading and the entries; the selected one stays in sight."""
        selected = self._selected()
        self.with_cursor = selected is not None
        if selected is not None and selected != self.cursor:
            self.put_cursor(selected)
        elif selected is None and not self.has_focus:
            self.top = 0
        self._clamp()  # the header counts the entries above the window
        return super().rows(width, height)

    def count(self) -> int:
        """The number of entries."""
        return len(self.entries())

    def header(self, width: int) -> list[Row]:
        """The title with the number of entries above the window, and the keys."""
        title = "What happened" + (f"  {self.top:,} newer ↑" if self.top else "")
        keys = "n N jump  enter open" if width >= WITH_CLOCK else "n N  enter"
        if self.state.live and not self.read_only and width >= WITH_CLOCK:
            keys += "  w note"
        return [heading(title, keys, width, focused=self.has_focus)]

    def empty(self) -> list[Row]:
        """The text of an empty timeline."""
        nothing = "reading …" if self.state.steps_unread else "nothing yet"
        return [[(f" {self.state.unread or nothing}", "dim")]]

    def row(self, index: int, width: int) -> Row:
        """The line of an entry."""
        return entry_line(self.entries()[index], width, self._step_width)

    def on_focus(self) -> None:
        """Marks the title."""
        self.update()

    def on_blur(self) -> None:
        """Removes the mark of the title."""
        self.update()

    # -- keys and mouse ------------------------------------------------------------------------

    def go(self, index: int) -> None:
        """Selects an entry."""
        self.with_cursor = True
        super().go(index)

    def moved(self) -> None:
        """Selects the entry under the cursor at once: the next key may be queued already."""
        entries = self.entries()
        if entries:
            entry = entries[self.cursor][-1]
            self.view.select(self.state, entry)
            self.post_message(RowHighlighted("timeline", entry.key))

    def action_move(self, lines: int) -> None:
        """Moves by entries; at first to the newest visible one."""
        self.go(self.cursor + lines if self.with_cursor else self.top)

    def action_choose(self) -> None:
        """Opens the selected entry, or the newest visible one."""
        if not self.entries():
            return
        if not self.with_cursor:
            self.go(self.top)
        self.post_message(RowSelected(self.view.selected or ""))

    def on_click(self, event: events.Click) -> None:
        """Selects an entry; a second click opens it."""
        line = event.y - len(self.header(self.size.width))
        if line < 0 or self.top + line >= self.count():
            return
        if self.top + line == self._selected():
            self.action_choose()
        else:
            self.go(self.top + line)


def entry_line(markers: list[Marker], width: int, step_width: int) -> Row:
    """An entry: step, sign, text, and its sender or that its branch is abandoned.

    Args:
        markers: of the entry, one or several checkpoints.
        width: cells; with many of them, the line begins with the time of day.
        step_width: cells of the step.
    """
    entry = markers[-1]
    tone = MARKER_TONES[entry.kind]
    text_tone = tone if entry.kind in ("alert", "crash") else ""
    left: list[tuple[str, str]] = [(f" {entry.step:>{step_width}} ", "dim")]
    if width >= WITH_CLOCK:
        left.insert(0, (f" {fmt.clock(entry.time)[11:16]}", "dim"))
    left += [(f"{MARKER_GLYPHS[entry.kind]} ", "dim" if entry.abandoned else tone)]
    note = "abandoned" if entry.abandoned else sender(entry.who)
    room = width - row_width(left) - (len(note) + 3 if note else 0)
    text = checkpoints_text(markers, room) if entry.kind == "checkpoint" else in_app(entry.text)
    left += [(text, "dim" if entry.abandoned else text_tone)]
    return justified(left, [(f" {note} ", "dim")], width) if note else left


def checkpoints_text(markers: list[Marker], room: int) -> str:
    """`checkpoints at 10, 20, 30`; with less room the first and the newest; one has its numbers."""
    steps = [str(m.step) for m in markers]
    if len(steps) == 1:
        text = markers[0].text
        while len(text) > room and ", " in text:  # no number is cut
            text = text.rpartition(", ")[0]
        return text
    texts = [f"checkpoints at {', '.join(steps)}"] if len(steps) <= MAX_STEPS else []
    newest = (", ".join(steps[-n:]) for n in range(min(len(steps) - 2, MAX_STEPS), 0, -1))
    texts += [f"checkpoints at {steps[0]}, … {some}" for some in newest]
    return next((text for text in texts if len(text) <= room), texts[-1])
