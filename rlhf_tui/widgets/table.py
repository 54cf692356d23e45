"""Tables: rows of cells with a cursor; only the visible rows are rendered."""

from typing import Any, ClassVar

from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType

from rlhf_tui.state.messages import HeaderSelected, RowHighlighted, RowSelected
from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Piece, Row, row_width, shorten, shorten_middle
from rlhf_tui.widgets.scroll_list import ScrollList


class Column:
    """A column of a table."""

    def __init__(
        self,
        title: str,
        width: int,
        *,
        right: bool = False,
        flexible: bool = False,
        hidden_below: int = 0,
        share: int = 1,
        both_ends: bool = False,
    ) -> None:
        """A column.

        Args:
            title: of the header.
            width: cells; ignored if flexible.
            right: align to the right.
            flexible: take a part of the remaining width.
            hidden_below: width of the table in cells below which the column is hidden.
            share: share of the remaining width for a flexible column, relative to the others.
            both_ends: cut text that is too long in its middle.
        """
        self.title, self.width = title, width
        self.right, self.flexible = right, flexible
        self.share, self.hidden_below = share, hidden_below
        self.both_ends = both_ends
        self.max_width = 0
        """Maximum width of a flexible column in cells; 0 for no limit."""
        self.has_values = True
        """Set it to False to hide the column."""


class Table(ScrollList):
    """Rows of cells with a cursor. Posts :class:`RowHighlighted` and :class:`RowSelected`."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "choose", show=False)]
    with_cursor = True

    def __init__(self, columns: list[Column], *, id: str, empty: list[Row] | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self.columns = columns
        self.sorted_by = ""
        self.descending = True
        self._empty = empty or []
        self._cells: list[list[Piece]] = []
        self._keys: list[Any] = []

    def set_rows(
        self,
        rows: list[tuple[Any, list[Piece]]],
        empty: list[Row] | None = None,
        *,
        key: Any = None,
        lost: int | None = None,
    ) -> None:
        """Replaces the rows.

        Args:
            rows: key and cells of each.
            empty: lines to show if there are no rows; None leaves them as they are.
            key: key of the row to put the cursor on; None: the row that it is on.
            lost: where the cursor goes if that row is gone; None: it keeps its position.
        """
        before, keys = self.key, self._keys
        key = before if key is None else key
        self._keys = [k for k, _ in rows]
        self._cells = [cells for _, cells in rows]
        if empty is not None:
            self._empty = empty
        if key in self._keys:
            self.cursor = self._keys.index(key)
        elif lost is not None:
            self.cursor = lost
        self._clamp()
        if self._keys != keys:
            self.top = self._top
        self.update()
        if self.key != before:
            self.post_message(RowHighlighted(self.id or "", self.key, moved=False))

    def set_cells(self, key: Any, cells: list[Piece]) -> None:
        """Replaces the cells of the row with this key, if there is one."""
        if key in self._keys:
            self._cells[self._keys.index(key)] = cells
            self.update()

    @property
    def key(self) -> Any:
        """The key of the row under the cursor; None without rows."""
        return self._keys[self.cursor] if self.cursor < len(self._keys) else None

    @property
    def keys(self) -> list[Any]:
        """The rows' keys, from the top."""
        return list(self._keys)

    def count(self) -> int:
        """The number of rows."""
        return len(self._keys)

    def empty(self) -> list[Row]:
        """The lines of an empty table, as given to :meth:`set_rows`."""
        return self._empty

    def moved(self) -> None:
        """Posts :class:`RowHighlighted` for the row under the cursor."""
        self.post_message(RowHighlighted(self.id or "", self.key))

    def action_choose(self) -> None:
        """Posts :class:`RowSelected` for the row under the cursor."""
        if self.key is not None:
            self.post_message(RowSelected(self.key))

    def on_click(self, event: events.Click) -> None:
        """Moves the cursor to a row; a second click selects it. Posts clicks on the header."""
        width = self.size.width
        line = event.y - len(self.header(width))
        if line < 0:
            if title := self._title_at(event.x, width):
                self.post_message(HeaderSelected(title))
            return
        index = self.top + line
        if 0 <= index < self.count():
            again = index == self.cursor
            self.go(index)
            if again:
                self.action_choose()

    def header(self, width: int) -> list[Row]:
        """The titles of the columns; the sorted column has an arrow."""
        if not any(column.title for column in self.columns):
            return []
        titles: list[Piece] = []
        for column in self.columns:
            arrow = (
                ("▾" if self.descending else "▴")
                if column.title and column.title == self.sorted_by
                else ""
            )
            titles.append((column.title + arrow, "head"))
        line = self._line(titles, width, "head")
        return [[*line, (" " * max(width - row_width(line), 0), "head")]]

    def row(self, index: int, width: int) -> Row:
        """The row at `index`, its cells in their columns."""
        return self._line(self._cells[index], width, "")

    def _title_at(self, x: int, width: int) -> str:
        """The title of the column at a cell; empty outside of columns with a title."""
        end = 1
        for column, room in self._widths(width):
            end += room + 1
            if x < end:
                return column.title
        return ""

    def _widths(self, width: int) -> list[tuple[Column, int]]:
        """The columns that are shown, with their cells."""
        shown = [c for c in self.columns if c.has_values and width >= c.hidden_below]
        fixed = sum(c.width for c in shown if not c.flexible) + len(shown) + 1
        shares = sum(c.share for c in shown if c.flexible)
        found = []
        for column in shown:
            cells = column.width
            if column.flexible:
                cells = max(width - fixed, 4) * column.share // shares
                cells = min(cells, column.max_width or cells)
            found.append((column, cells))
        return found

    def _line(self, cells: list[Piece], width: int, gap: str) -> list[Piece]:
        rooms = dict(self._widths(width))
        line: list[Piece] = [(" ", gap)]
        for column, (text, tone) in zip(self.columns, cells, strict=True):
            if column in rooms:
                room, right, both = rooms[column], column.right, column.both_ends
                line += [(fitted(text, room, right=right, both_ends=both), tone), (" ", gap)]
        return line


def fitted(text: str, width: int, *, right: bool = False, both_ends: bool = False) -> str:
    """Text padded or cut to exactly `width` cells."""
    text = one_line(text)
    room = width - cell_len(text)
    if right and room > 0:
        return " " * room + text
    return shorten_middle(text, width) if both_ends else shorten(text, width)


def sortable(value: float | None) -> float:
    """The value as a sort key; a missing one sorts before all numbers."""
    return float("-inf") if value is None else value
