"""Rasterising of series in Braille characters: decimation to columns, then dots.

A cell has 2×4 dots. Each column of dots shows the minimum and maximum of its points, so no spike is
lost, whatever the number of points.
"""

import math

from msgspec import Struct

from rlhf_tui.state.series import Series

BRAILLE = 0x2800
# The bit of a dot by column and row in the cell (Unicode's numbering of Braille dots).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_RUNS = tuple(
    tuple(tuple(sum(side[a : b + 1]) for b in range(4)) for a in range(4)) for side in _DOTS
)
"""`_RUNS[side][a][b]`: the bits of dots `a` to `b` of a side (0 left, 1 right) of a cell."""


class Column(Struct, frozen=True):
    """The points in one column of dots: extremes, first and last value."""

    x: int
    low: float
    high: float
    first: float
    last: float


class Scale(Struct, frozen=True):
    """Maps values to rows of dots, from `low` (bottom) to `high` (top)."""

    low: float
    high: float
    log: bool = False
    grid: float = 0.0
    """A round number; both ends are multiples of it, two to five apart. 0 if logarithmic."""

    def row(self, value: float, rows: int) -> int:
        """The row of a value among `rows`, 0 at the top, clamped."""
        low, high = self.low, self.high
        if self.log:
            value = math.log10(max(value, low))
            low, high = math.log10(low), math.log10(high)
        share = (value - low) / (high - low)
        return min(max(round((1 - share) * (rows - 1)), 0), rows - 1)


def column_of(step: float, first: float, last: float, columns: int) -> int:
    """The column of a step in the window [first, last]; outside [0, columns) for other steps."""
    return math.floor((step - first) / max(last - first, 1) * (columns - 1) + 0.5)


def step_of(column: int, first: float, last: float, columns: int) -> float:
    """The step in the middle of a column."""
    return first + column / max(columns - 1, 1) * max(last - first, 1)


def decimate(series: Series, first: float, last: float, columns: int) -> list[Column]:
    """The non-empty columns of the window [first, last], left to right."""
    begin, end = series.between(first, last)
    if begin == end:
        return []
    if end - begin <= 2 * columns:
        return _sparse(series, begin, end, first, last, columns)
    result = []
    width = max(last - first, 1) / max(columns - 1, 1)
    i = begin
    for x in range(columns):
        j = min(series.between(first, first + (x + 0.5) * width)[1], end)
        if j > i:
            low, high = series.extremes(i, j)
            result.append(Column(x, low, high, series.values[i], series.values[j - 1]))
            i = j
    return result


def _sparse(
    series: Series, begin: int, end: int, first: float, last: float, columns: int
) -> list[Column]:
    """Columns of few points, each point visited once."""
    result: list[Column] = []
    for i in range(begin, end):
        x = column_of(series.steps[i], first, last, columns)
        v = series.values[i]
        if result and result[-1].x == x:
            old = result[-1]
            result[-1] = Column(x, min(old.low, v), max(old.high, v), old.first, v)
        else:
            result.append(Column(x, v, v, v, v))
    return result


class Raster:
    """Dots in cells; each cell belongs to the line that was drawn there last."""

    def __init__(self, width: int, height: int) -> None:
        """An empty raster of `width` × `height` cells."""
        self.width, self.height = width, height
        self.bits = bytearray(width * height)
        self.owner = bytearray(width * height)

    def draw(self, columns: list[Column], scale: Scale, owner: int) -> None:
        """Draws a line through decimated columns; `owner` is the number of the line."""
        rows = self.height * 4
        before: Column | None = None
        for column in columns:
            top, bottom = scale.row(column.high, rows), scale.row(column.low, rows)
            if before is not None:
                start, end = scale.row(before.last, rows), scale.row(column.first, rows)
                span = column.x - before.x
                if span > 1:
                    self._slope(before.x, column.x, start, end, owner)
                elif top > start:
                    top = min(start + 1, top)
                elif bottom < start:
                    bottom = max(start - 1, bottom)
            self.fill(column.x, top, bottom, owner)
            before = column

    def draw_extremes(self, columns: list[Column], scale: Scale, owner: int) -> None:
        """Draws the highest and the lowest value of each column, and no line between them."""
        for column in columns:
            for value in (column.high, column.low):
                y = scale.row(value, self.height * 4)
                self.fill(column.x, y, y, owner)

    def _slope(self, x0: int, x1: int, y0: int, y1: int, owner: int) -> None:
        """Connects two columns that have empty columns between them."""
        y = y0
        for x in range(x0 + 1, x1 + 1):
            to = round(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
            a, b = (y, to) if y <= to else (to, y)
            # The starting row is left out, which keeps the slope one dot thin.
            if a != b:
                a, b = (a + 1, b) if y < to else (a, b - 1)
            self.fill(x, a, b, owner)
            y = to

    def fill(self, x: int, top: int, bottom: int, owner: int) -> None:
        """Sets the dots of column `x` from row `top` down to row `bottom`."""
        cell_x, side = x >> 1, _RUNS[x & 1]
        for cell_y in range(top >> 2, (bottom >> 2) + 1):
            a = max(top - cell_y * 4, 0)
            b = min(bottom - cell_y * 4, 3)
            i = cell_y * self.width + cell_x
            # A cell has one colour: dots of another line would change to the colour of this one.
            if self.owner[i] != owner:
                self.bits[i], self.owner[i] = 0, owner
            self.bits[i] |= side[a][b]
