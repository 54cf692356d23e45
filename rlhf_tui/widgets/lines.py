"""A widget of lines of text that sends only changed cells to the terminal.

All text is sanitised here by :func:`~rlhf_tui.text.one_line`; callers need not do it.
"""

from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from rlhf_tui.text import one_line
from rlhf_tui.widgets.tones import style_of

Piece = tuple[str, str]
"""Text and its tone, a key of :data:`~rlhf_tui.widgets.tones.TONES`."""
Row = Sequence[Piece]

MIN_FOR_BOTH_ENDS = 10
"""Minimum cells of a text whose middle is cut."""
SELECTED_PREFIX = "*"
"""Prefix of a tone: the same tone on the background of the selected line."""


class Lines(Widget):
    """Lines of pieces. A line that is too long ends in an ellipsis."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id, markup=False)
        self._rows: list[Row] = []
        self._strips: list[Strip] = []
        self._tones: dict[str, Style] = {}

    def rows(self, width: int, height: int) -> list[Row]:
        """The lines for a size in cells. Override it to compute them."""
        return self._rows

    def show(self, rows: list[Row]) -> None:
        """Replaces the lines."""
        self._rows = rows
        self.update()

    def update(self) -> None:
        """Renders the lines again. Only changed cells are sent."""
        width, height = self.size
        if not width or not height:
            return
        rows = self.rows(width, height)[:height]
        rows += [[]] * (height - len(rows))
        new = [render_row(row, width, self.tone) for row in rows]
        if len(self._strips) != height:
            self._strips = new
            self.refresh()
            return
        changed = [
            Region(span[0], y, span[1] - span[0], 1)
            for y, (old, now) in enumerate(zip(self._strips, new, strict=True))
            if (span := changed_span(old, now)) is not None
        ]
        self._strips = new
        if changed:
            self.refresh(*changed)

    def notify_style_update(self) -> None:
        """Drops all cached styles and lines when the theme changes."""
        self._tones.clear()
        self._strips = []
        super().notify_style_update()
        if self.is_mounted:
            self.update()

    def on_resize(self) -> None:
        """Renders all lines for the new size."""
        self._strips = []
        self.update()

    def render_line(self, y: int) -> Strip:
        """The rendered line `y`. Textual calls it."""
        if y < len(self._strips):
            return self._strips[y]
        return Strip.blank(self.size.width, self.rich_style)

    def tone(self, name: str) -> Style:
        """The style of a tone in the current theme, cached."""
        if name not in self._tones:
            chosen = name.startswith(SELECTED_PREFIX)
            style = style_of(self, name.removeprefix(SELECTED_PREFIX), chosen=chosen)
            self._tones[name] = style
        return self._tones[name]

    def text(self) -> str:
        """The visible lines as plain text, cut to the width, without trailing spaces."""
        width, height = self.size
        return plain_text(self.rows(width, height)[:height], width)


def render_row(row: Row, width: int, style: Callable[[str], Style]) -> Strip:
    """Renders a row in exactly `width` cells.

    Args:
        row: the pieces; text that does not fit is cut with an ellipsis.
        width: cells.
        style: maps a tone to its style.
    """
    segments, left = [], width
    for text, tone in row:
        text = one_line(text)
        size = cell_len(text)
        if size > left:
            text, size = shorten(text, left), left
        if text:
            segments.append(Segment(text, style(tone)))
        left -= size
        if left <= 0:
            break
    if left > 0:
        chosen = bool(row) and row[-1][1].startswith(SELECTED_PREFIX)
        segments.append(Segment(" " * left, style(SELECTED_PREFIX if chosen else "")))
    return Strip(segments, width)


def plain_text(rows: Iterable[Row], width: int) -> str:
    """Rows rendered in `width` cells, without styles."""
    return "\n".join(render_row(row, width, lambda _tone: Style()).text.rstrip() for row in rows)


def shorten(text: str, width: int) -> str:
    """Text padded or cut to exactly `width` cells; cut text ends in an ellipsis."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


def shorten_middle(text: str, width: int) -> str:
    """Like :func:`shorten`, but keeps both ends: the names of a sweep's runs differ in the last.

    In a few cells, neither end would tell anything: then the beginning is kept.
    """
    if cell_len(text) <= width or width < MIN_FOR_BOTH_ENDS:
        return shorten(text, width)
    end = text
    while cell_len(end) > max(width - 1, 0) // 2:
        end = end[1:]
    return shorten(text, width - cell_len(end)) + end


def row_width(row: Row) -> int:
    """Cells of a row."""
    return sum(cell_len(one_line(text)) for text, _ in row)


def justified(left: Row, right: Row, width: int) -> Row:
    """A row with `left` and `right` aligned to its ends; `left` is cut if necessary."""
    room = width - row_width(right)
    gap = room - row_width(left)
    if gap >= 0:
        return [*left, (" " * gap, ""), *right]
    kept: list[Piece] = []
    for text, tone in left:
        size = cell_len(one_line(text))
        if size >= room - 1:
            kept.append((shorten(one_line(text), max(room - 1, 0)), tone))
            break
        kept.append((text, tone))
        room -= size
    return [*kept, (" ", ""), *right]


def flowed(groups: Sequence[Row], width: int, gap: str = "   ") -> list[Row]:
    """Groups of pieces in as few rows as fit in `width` cells; no group is broken."""
    rows: list[list[Piece]] = []
    for group in groups:
        if rows and row_width(rows[-1]) + cell_len(gap) + row_width(group) <= width:
            rows[-1] += [(gap, ""), *group]
        else:
            rows.append([*group])
    return list(rows)


def changed_span(old: Strip, new: Strip) -> tuple[int, int] | None:
    """[first, end) of the cells that differ; None if the strips are equal."""
    if old == new:
        return None
    before, after = _cells(old), _cells(new)
    if not len(before) == len(after) == new.cell_length:
        # Some characters have no cell, or share one: the columns of the others are not known.
        return 0, new.cell_length
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), None)
    if first is None:
        return None
    end = len(after)
    while before[end - 1] == after[end - 1]:
        end -= 1
    return first, end


def _cells(strip: Strip) -> list[tuple[str, Style | None]]:
    cells: list[tuple[str, Style | None]] = []
    for text, style, _ in strip:
        for char in text:
            cells.append((char, style))
            cells.extend([("", style)] * (cell_len(char) - 1))
    return cells
