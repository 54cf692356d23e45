"""Scrolling lists that render only the visible lines: logs, texts, and the base of tables."""

from itertools import groupby
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from rlhf_tui.widgets.lines import SELECTED_PREFIX, Lines, Piece, Row, justified, plain_text

WHEEL_LINES = 3
THUMB, TRACK = "█", "│"


class ScrollList(Lines, can_focus=True):
    """Scrolls over :meth:`count` lines from :meth:`row`. A subclass may have a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "move(1)", "down", show=False),
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("pagedown,space", "page(1)", "a page down", show=False),
        Binding("pageup", "page(-1)", "a page up", show=False),
        Binding("home,g", "edge(0)", "to the first", show=False),
        Binding("end,G", "edge(1)", "to the last", show=False),
    ]
    with_cursor = False
    with_scrollbar = False
    """Whether the last column is a scroll bar while not all lines are visible."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._top = self._asked_top = 0
        self.cursor = 0
        self.matching = ""
        """Text to highlight in all lines."""

    @property
    def top(self) -> int:
        """The index of the first visible line.

        It is derived from the requested line: lines that a small window has scrolled away become
        visible again when there is room for them.
        """
        return self._top

    @top.setter
    def top(self, index: int) -> None:
        self._top = self._asked_top = index

    def count(self) -> int:
        """The number of lines. Override it."""
        return 0

    def row(self, index: int, width: int) -> Row:
        """The line at `index`. Override it."""
        return []

    def header(self, width: int) -> list[Row]:
        """Lines above the list that do not scroll. Override it to have some."""
        return []

    def empty(self) -> list[Row]:
        """The lines of an empty list. Override it to have some."""
        return []

    @property
    def page_size(self) -> int:
        """The number of visible lines."""
        return max(self.size.height - len(self.header(self.size.width)), 1)

    def rows(self, width: int, height: int) -> list[Row]:
        """The header and the visible lines."""
        header = self.header(width)
        count, page = self.count(), height - len(header)
        if not count:
            return [*header, *self.empty()]
        self._clamp()
        with_bar = self.with_scrollbar and count > page > 0
        room = width - 1 if with_bar else width
        body = []
        for index in range(self.top, min(self.top + page, count)):
            row = self.row(index, room)
            if self.matching:
                row = marked(row, self.matching)
            if self.with_cursor and index == self.cursor:
                row = [(text, SELECTED_PREFIX + tone) for text, tone in row]
            body.append(row)
        if not with_bar:
            return [*header, *body]
        first, last = thumb(self.top, page, count)
        bar: list[Piece] = [
            (THUMB if first <= y < last else TRACK, "dim") for y in range(len(body))
        ]
        body = [justified(row, [piece], width) for row, piece in zip(body, bar, strict=True)]
        return [*(justified(row, [(" ", "head")], width) for row in self.header(room)), *body]

    def text(self) -> str:
        """All lines as plain text, including those outside the window."""
        width, count = self.size.width, self.count()
        body = [self.row(index, width) for index in range(count)] if count else self.empty()
        return plain_text([*self.header(width), *body], width)

    def _clamp(self) -> None:
        """Keeps cursor and window within the list, and the cursor in the window."""
        count, page = self.count(), self.page_size
        self.cursor = min(max(self.cursor, 0), max(count - 1, 0))
        top = self._asked_top
        if self.with_cursor:
            top = min(max(top, self.cursor - page + 1), self.cursor)
        self._top = min(max(top, 0), max(count - page, 0))

    # -- moving --------------------------------------------------------------------------------

    def go(self, index: int) -> None:
        """Moves to a line."""
        if self.with_cursor:
            self.put_cursor(index)
        else:
            self.top = index
            self._clamp()
            self.top = self._top
        self.moved()
        self.update()

    def put_cursor(self, index: int) -> None:
        """Puts the cursor on a line; the window scrolls no further than necessary."""
        self.top, self.cursor = self._top, index
        self._clamp()
        self.top = self._top

    def moved(self) -> None:
        """Called after each move. Override it to react."""

    def action_move(self, lines: int) -> None:
        """Moves by lines."""
        self.go((self.cursor if self.with_cursor else self.top) + lines)

    def action_page(self, pages: int) -> None:
        """Moves by pages."""
        self.action_move(pages * max(self.page_size - 1, 1))

    def action_edge(self, end: int) -> None:
        """Moves to the first or the last line."""
        self.go(self.count() - 1 if end else 0)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Scrolls."""
        event.stop()
        self.action_move(WHEEL_LINES)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Scrolls."""
        event.stop()
        self.action_move(-WHEEL_LINES)


class ScrollText(ScrollList):
    """A fixed list of rows without a cursor."""

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._body: list[Row] = []

    def set_body(self, rows: list[Row], *, keep: bool = False) -> None:
        """Replaces the rows. Scrolls to the top unless `keep` is set."""
        self._body = rows
        if not keep:
            self.top = 0
        self.update()

    def count(self) -> int:
        """The number of rows."""
        return len(self._body)

    def row(self, index: int, width: int) -> Row:
        """The row at `index`."""
        return self._body[index]


def thumb(top: int, page: int, count: int) -> tuple[int, int]:
    """[first, end) of the lines of a scroll bar that stand for the visible lines.

    Args:
        top: the first visible line of the list.
        page: visible lines, the height of the scroll bar.
        count: lines of the list, more than `page`.
    """
    size = max(page * page // count, 1)
    first = round(top * (page - size) / (count - page))
    return first, first + size


def marked(row: Row, words: str) -> Row:
    """A row with all occurrences of `words` highlighted, ignoring case."""
    lower, needle = _lower("".join(text for text, _ in row)), _lower(words)
    inside = [False] * len(lower)
    at = lower.find(needle)
    while at >= 0:
        end = at + len(needle)
        inside[at:end] = [True] * len(needle)
        at = lower.find(needle, end)
    chars = [(char, tone) for text, tone in row for char in text]
    toned = [(c, "match" if hit else tone) for (c, tone), hit in zip(chars, inside, strict=True)]
    grouped = groupby(toned, key=lambda each: each[1])
    return [("".join(char for char, _ in group), tone) for tone, group in grouped]


def _lower(text: str) -> str:
    """The text in lower case, but for letters that have another length there."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)
