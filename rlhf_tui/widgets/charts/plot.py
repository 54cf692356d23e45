"""Painting of a chart as characters and styles, independent of Textual."""

import math
from collections.abc import Iterator
from itertools import chain

import msgspec
from msgspec import Struct

from rlhf_tui.state.marked_steps import MarkedSteps
from rlhf_tui.state.series import Series
from rlhf_tui.state.timeline import MARKER_GLYPHS
from rlhf_tui.widgets.charts.axis import GUTTER, TARGET_BAND, labels, scale_of
from rlhf_tui.widgets.charts.raster import BRAILLE, Column, Raster, Scale, column_of, decimate

STYLES = (
    "", "dim", "title", "value", "focus", "s1", "s2", "s3", "s4", "s5", "s6",
    "raw", "past", "target", "rule", "command", "checkpoint", "attempt", "alert", "note",
    "crash",
)  # fmt: skip
STYLE = {name: i for i, name in enumerate(STYLES)}
BAND, CURSOR, BAR, FOCUS = 32, 64, 128, 256
BACKGROUNDS = {BAND: "band", CURSOR: "crosshair", BAR: "title", FOCUS: "focus"}
"""Tone of the background by flag. Flags are added to the number of a style."""
POINT = "•"
"""Marks the points of a sparse curve."""
BAR_SPACING = 6
"""Mean number of dot columns between the points of a curve below which it has no bars."""
PRIORITY = ("checkpoint", "attempt", "note", "command", "alert", "crash")
"""Kinds of markers; of those in one cell the last is visible, and abandoned ones are below all."""
MarkedCells = dict[tuple[str, bool], list[int]]
"""(kind, abandoned) → the cells of the axis that have such a marker."""


class Line(Struct, frozen=True):
    """A curve and its style, one of :data:`STYLES`."""

    series: Series
    style: str
    mark: str = ""
    """A character at its newest point, which the legend explains; empty for none."""
    sparse: bool = False
    """Whether it has few points, each of which is marked with :data:`POINT`."""
    dotted: bool = False
    """Whether only the extremes of each column are drawn, to differ from a line without colours."""
    interval: Series | None = None
    """Half the height of the bar at each point, by step; no bars for None."""


class Plot(Struct, frozen=True):
    """Everything a chart shows."""

    title: str
    value: str
    first: float
    last: float
    lines: list[Line] = msgspec.field(default_factory=list)
    """Drawn in this order; the last one is on top."""
    legend: list[str] = msgspec.field(default_factory=list)
    """Styles of the names in the title if there are several."""
    overlays: list[tuple[str, str, str]] = msgspec.field(default_factory=list)
    """Mark, name and style of each curve of another session."""
    unit: str = ""
    note: str = ""
    """How the curve is drawn. Takes precedence over the unit if only one of them fits."""
    log: bool = False
    target: float | None = None
    markers: MarkedSteps = msgspec.field(default_factory=MarkedSteps)
    past: bool = False
    """Whether the markers of abandoned branches are drawn as well."""
    cursor: int | None = None
    focused: bool = False
    empty: str = "no values yet"


class Canvas:
    """A grid of characters and style numbers (an index of :data:`STYLES`, plus flags)."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.chars = [[" "] * width for _ in range(height)]
        self.styles = [[0] * width for _ in range(height)]
        self.drawing: Drawing | None = None
        """Its curves; None if there is no room for any."""

    def write(self, x: int, y: int, text: str, style: int) -> None:
        """Writes text into row `y` from column `x`; what lies outside is dropped."""
        for i, char in enumerate(text, start=x):
            if 0 <= i < self.width:
                self.chars[y][i] = char
                self.styles[y][i] = style

    def row_text(self, y: int) -> str:
        """Row `y` as text."""
        return "".join(self.chars[y])


class Drawing(Struct, frozen=True):
    """The curves of a chart as dots."""

    key: object
    """Everything that the curves depend on."""
    columns: list[list[Column]]
    """The columns of each line."""
    scale: Scale | None
    """None without values."""
    raster: Raster
    band_rows: range
    """The rows that the target's band covers."""


def paint(plot: Plot, width: int, height: int, last: Canvas | None = None) -> Canvas:
    """Paints a chart: title, curves with their scale, axis with markers.

    With many curves nearly all of the time goes into drawing them. They are reused from `last`, the
    chart as it was painted before, if only crosshair, markers or title have changed.
    """
    canvas = Canvas(width, height)
    _title(canvas, plot)
    cells, rows = width - GUTTER, height - 2
    if cells < 4 or rows < 1:
        return canvas
    drawing = last.drawing if last is not None else None
    if drawing is None or drawing.key != _key(plot, cells, rows):
        drawing = _draw(plot, cells, rows)
    canvas.drawing = drawing
    marked = _marked_cells(plot, cells)
    if (scale := drawing.scale) is None:
        canvas.write(GUTTER, 1 + rows // 2, plot.empty[: cells - 1], STYLE["dim"])
    else:
        _curves(canvas, plot, drawing, cells, rows, marked)
        _points(canvas, plot, drawing, scale)
        for y, label in labels(scale, rows):
            canvas.write(0, 1 + y, label.rjust(GUTTER - 1), STYLE["dim"])
    _axis(canvas, plot, cells, rows, marked)
    return canvas


def _key(plot: Plot, cells: int, rows: int) -> object:
    """Everything that the curves depend on. A changed series is another object, or longer."""
    lines = [
        (x.series, len(x.series), x.style, x.sparse, x.dotted, x.interval, len(x.interval or ()))
        for x in plot.lines
    ]
    window = plot.first, plot.last, plot.log, plot.target
    return cells, rows, window, lines


def _draw(plot: Plot, cells: int, rows: int) -> Drawing:
    columns = [_columns(line, plot, cells * 2) for line in plot.lines]
    bars = [_bars(line, plot, cells * 2) for line in plot.lines]
    scale = scale_of(columns + bars, target=plot.target, log=plot.log)
    raster, band_rows = Raster(cells, rows), range(0)
    if scale is not None:
        band_rows = _target(raster, plot, scale)
        for line, points, intervals in zip(plot.lines, columns, bars, strict=True):
            draw = raster.draw_extremes if line.dotted else raster.draw
            draw(points, scale, STYLE[line.style])
            for bar in intervals:
                top, bottom = scale.row(bar.high, rows * 4), scale.row(bar.low, rows * 4)
                raster.fill(bar.x, top, bottom, STYLE[line.style])
    return Drawing(_key(plot, cells, rows), columns, scale, raster, band_rows)


def _columns(line: Line, plot: Plot, columns: int) -> list[Column]:
    """A curve in the window. A sparse one is cut at the window's edges, not at its last points."""
    found = decimate(line.series, plot.first, plot.last, columns)
    if not line.sparse:
        return found
    for x, step, at in ((0, plot.first, 0), (columns - 1, plot.last, len(found) + 1)):
        value = line.series.interpolated(step)
        if value is not None and all(column.x != x for column in found):
            found.insert(at, Column(x, value, value, value, value))
    return found


def _bars(line: Line, plot: Plot, columns: int) -> list[Column]:
    """The interval bars of a curve's points, if there is room between the points."""
    if line.interval is None:
        return []
    begin, end = line.series.between(plot.first, plot.last)
    if (end - begin - 1) * BAR_SPACING > columns:
        return []
    bars = []
    for i in range(begin, end):
        step, value = line.series.steps[i], line.series.values[i]
        if (half := line.interval.at(step)) is not None:
            x = column_of(step, plot.first, plot.last, columns)
            bars.append(Column(x, value - half, value + half, value, value))
    return bars


def _title(canvas: Canvas, plot: Plot) -> None:
    bar, value = ("focus", "focus") if plot.focused else ("title", "value")
    # The mark repeats what the colour shows, for terminals without colour.
    name = f"{'▸' if plot.focused else ' '}{plot.title}"
    canvas.write(0, 0, " " * canvas.width, STYLE[bar])
    room = canvas.width - len(plot.value) - 2
    canvas.write(0, 0, name[:room], STYLE[bar])
    _legend(canvas, plot, name[:room])
    for extra in (f"{plot.unit}  {plot.note}", plot.note, plot.unit):
        if extra.strip() and len(name) + 2 + len(extra.strip()) < room:
            canvas.write(len(name) + 2, 0, extra.strip(), STYLE[bar])
            name += f"  {extra.strip()}"
            break
    _overlays(canvas, plot, len(name) + 2, room)
    canvas.write(canvas.width - len(plot.value) - 1, 0, plot.value, STYLE[value])


def _legend(canvas: Canvas, plot: Plot, shown: str) -> None:
    """Paints several names of a title in the colours of their curves."""
    if len(plot.legend) < 2:
        return
    flag, at = FOCUS if plot.focused else BAR, 1
    for name, style in zip(plot.title.split(" + "), plot.legend, strict=False):
        canvas.write(at, 0, shown[at : at + len(name)], STYLE[style] | flag)
        at += len(name) + 3


def _overlays(canvas: Canvas, plot: Plot, x: int, end: int) -> None:
    """Paints the legend of the overlaid sessions into the title: their names, or their marks."""
    flag = FOCUS if plot.focused else BAR
    texts = [f"{mark} {name}" for mark, name, _ in plot.overlays]
    if sum(len(t) + 2 for t in texts) > end - x:
        texts = [mark for mark, _, _ in plot.overlays]
    for text, (_, _, style) in zip(texts, plot.overlays, strict=True):
        if x + len(text) <= end:
            canvas.write(x, 0, text, STYLE[style] | flag)
            x += len(text) + 2


def _curves(
    canvas: Canvas, plot: Plot, drawing: Drawing, cells: int, rows: int, marked: MarkedCells
) -> None:
    raster, band_rows = drawing.raster, drawing.band_rows
    lines = (at for (kind, past), at in marked.items() if kind != "checkpoint" and not past)
    ruled = set(chain.from_iterable(lines))
    cursor = None if plot.cursor is None else _cell(plot.cursor, plot, cells)
    for y in range(rows):
        chars, styles = canvas.chars[1 + y], canvas.styles[1 + y]
        flag = BAND if y in band_rows else 0
        for x in range(cells):
            bits = raster.bits[y * cells + x]
            char, number = " ", 0
            if bits:
                char, number = chr(BRAILLE + bits), raster.owner[y * cells + x]
                number |= CURSOR if x == cursor else 0
            elif x == cursor:
                char, number = "│", STYLE["rule"]
            elif x in ruled:
                char, number = "┊", STYLE["dim"]
            chars[GUTTER + x] = char
            styles[GUTTER + x] = number | flag


def _points(canvas: Canvas, plot: Plot, drawing: Drawing, scale: Scale) -> None:
    """Marks the points of sparse curves, and the newest point of overlaid ones."""
    window = plot.first, plot.last, drawing.raster.width * 2
    rows = drawing.raster.height
    for curve, points in zip(plot.lines, drawing.columns, strict=True):
        style = curve.style
        for point in decimate(curve.series, *window) if curve.sparse else []:
            y = scale.row(point.last, rows * 4) // 4
            _point(canvas, point.x // 2, y, POINT, style)
        if curve.mark and points:
            y = scale.row(points[-1].last, rows * 4) // 4
            _point(canvas, points[-1].x // 2, y, curve.mark, style)


def _point(canvas: Canvas, x: int, y: int, mark: str, style: str) -> None:
    """Writes a mark in a cell of the curves, on the background that the cell has."""
    background = canvas.styles[1 + y][GUTTER + x] & (BAND | CURSOR)
    canvas.write(GUTTER + x, 1 + y, mark, STYLE[style] | background)


def _target(raster: Raster, plot: Plot, scale: Scale) -> range:
    """Draws the edges of the target's band, dotted, for terminals without colour.

    Returns:
        The rows that the band covers.
    """
    if plot.target is None:
        return range(0)
    rows = raster.height * 4
    low, high = plot.target * (1 - TARGET_BAND), plot.target * (1 + TARGET_BAND)
    if low > scale.high or high < scale.low:
        return range(0)
    top, bottom = scale.row(high, rows), scale.row(low, rows)
    for x in range(0, raster.width * 2, 4):
        for y, inside in ((top, high <= scale.high), (bottom, low >= scale.low)):
            if inside:
                raster.fill(x, y, y, STYLE["target"])
    return range(top // 4, bottom // 4 + 1)


def _axis(canvas: Canvas, plot: Plot, cells: int, rows: int, marked: MarkedCells) -> None:
    y = 1 + rows
    first, last = steps_text(plot.first), steps_text(plot.last)
    both = [f"{first}–{last}", f"{first}–{_thousands(plot.last)}"]
    label = next((text for text in both if len(text) < GUTTER), first)
    canvas.write(0, y, label.rjust(GUTTER - 1), STYLE["dim"])
    canvas.write(GUTTER, y, "─" * cells, STYLE["dim"])
    for (kind, abandoned), found in marked.items():
        for cell in found:
            style = STYLE["past" if abandoned else kind]
            canvas.write(GUTTER + cell, y, MARKER_GLYPHS[kind], style)
    if label == first:
        canvas.write(canvas.width - len(last) - 1, y, f" {last}", STYLE["dim"])
    if plot.cursor is not None and (at := _cell(plot.cursor, plot, cells)) is not None:
        label = steps_text(plot.cursor)
        at = min(max(GUTTER + at - len(label) // 2, GUTTER), canvas.width - len(label))
        canvas.write(at, y, label, STYLE["rule"])


def _marked_cells(plot: Plot, cells: int) -> MarkedCells:
    """The cells of the axis that have a marker, by (kind, abandoned), in the order of drawing."""
    return {
        (kind, abandoned): list(_cells_of(plot, cells, kind, abandoned=abandoned))
        for abandoned in ((True, False) if plot.past else (False,))
        for kind in PRIORITY
    }


def _cells_of(plot: Plot, cells: int, kind: str, *, abandoned: bool) -> Iterator[int]:
    """The cells with a marker of a kind. Skips the others in a cell: a run may have thousands."""
    width = max(plot.last - plot.first, 1) / max(cells * 2 - 1, 1)
    step = plot.markers.first_from(plot.first, kind, abandoned=abandoned)
    while step is not None and (x := _cell(step, plot, cells)) is not None:
        yield x
        # Rounded down: of a step on the edge, only `_cell` knows the cell.
        next_cell = math.floor(plot.first + (2 * x + 1.5) * width)
        step = plot.markers.first_from(max(next_cell, step + 1), kind, abandoned=abandoned)


def _cell(step: float, plot: Plot, cells: int) -> int | None:
    """The column of a step in cells; None outside the window."""
    if not plot.first <= step <= plot.last:
        return None
    return column_of(step, plot.first, plot.last, cells * 2) // 2


def steps_text(step: float) -> str:
    """A step as `1,234` or `1.20M`."""
    whole = round(step)
    return f"{whole:,}" if whole < 1e6 else f"{whole / 1e6:.2f}M"


def _thousands(step: float) -> str:
    """A step below a million as `57.5k` or `575k`."""
    return f"{step / 1000:.{1 if step < 1e5 else 0}f}k" if step < 1e6 else steps_text(step)
