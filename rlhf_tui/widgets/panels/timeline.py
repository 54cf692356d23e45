"""The timeline: what happened, newest first. Its entries can be selected and opened."""

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from rlhf_tui import format as fmt
from rlhf_tui.state.messages import RowHighlighted, RowSelected
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, MARKER_TONES, Marker, sender
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.lines import Row, justified
from rlhf_tui.widgets.panels.panel import heading
from rlhf_tui.widgets.scroll_list import ScrollList

WITH_CLOCK = 60
"""Cells from which on each entry has its time of day."""


class TimelinePanel(ScrollList):
    """One line per entry. Posts :class:`RowHighlighted` and :class:`RowSelected` with its key."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "open", show=False)]
    read_only = False

    def __init__(self, state: SessionState, view: Viewport) -> None:
        """`view` has the selected entry, which the charts share."""
        super().__init__(id="timeline")
        self.state, self.view = state, view

    def read(self, state: SessionState, view: Viewport) -> None:
        """Shows another state, or another selection."""
        self.state, self.view = state, view
        self.update()

    def entries(self) -> list[Marker]:
        """The entries, newest first."""
        return self.state.timeline()[::-1]

    # -- the list ------------------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The heading and the entries; the selected one stays in sight."""
        keys = [entry.key for entry in self.entries()]
        self.with_cursor = self.view.selected in keys
        if self.view.selected in keys:
            self.cursor = keys.index(self.view.selected)
        elif not self.has_focus:
            self.top = 0
        self._clamp()  # the header counts the entries above the window
        return super().rows(width, height)

    def count(self) -> int:
        """The number of entries."""
        return len(self.state.timeline())

    def header(self, width: int) -> list[Row]:
        """The title with the number of entries above the window, and the keys."""
        title = "What happened" + (f"  {self.top:,} newer ↑" if self.top else "")
        keys = "n N jump  enter open" if width >= WITH_CLOCK else "n N  enter"
        if self.state.live and not self.read_only and width >= WITH_CLOCK:
            keys += "  w note"
        return [heading(title, keys, width, focused=self.has_focus)]

    def empty(self) -> list[Row]:
        """What will be here."""
        return [[(" nothing yet: changes, alerts and checkpoints appear here", "dim")]]

    def row(self, index: int, width: int) -> Row:
        """An entry: step, sign, text, and who it was or that its branch is abandoned."""
        entry = self.state.timeline()[-1 - index]
        tone = MARKER_TONES[entry.kind]
        text_tone = tone if entry.kind in ("alert", "crash") else ""
        left: list[tuple[str, str]] = [(f" {entry.step:>6} ", "dim")]
        if width >= WITH_CLOCK:
            left.insert(0, (f" {fmt.clock(entry.time)[11:16]}", "dim"))
        left += [(f"{MARKER_GLYPHS[entry.kind]} ", "dim" if entry.abandoned else tone)]
        left += [(entry.text, "dim" if entry.abandoned else text_tone)]
        note = "abandoned" if entry.abandoned else sender(entry.who)
        return justified(left, [(f" {note} ", "dim")], width) if note else left

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
            self.view.select(self.state, entries[self.cursor])
            self.post_message(RowHighlighted("timeline", entries[self.cursor].key))

    def action_move(self, lines: int) -> None:
        """Moves by entries; at first to the newest one in sight."""
        self.go(self.cursor + lines if self.with_cursor else self.top)

    def action_choose(self) -> None:
        """Opens the selected entry, or the newest one in sight."""
        entries = self.entries()
        if entries:
            self._open(entries[self.cursor if self.with_cursor else self.top])

    def on_click(self, event: events.Click) -> None:
        """Selects an entry; a second click opens it."""
        line = event.y - len(self.header(self.size.width))
        if line < 0 or self.top + line >= self.count():
            return
        entry = self.entries()[self.top + line]
        again = entry.key == self.view.selected
        self.go(self.top + line)
        if again:
            self._open(entry)

    def _open(self, entry: Marker) -> None:
        self.post_message(RowSelected("timeline", entry.key))
