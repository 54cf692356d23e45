"""A chart as characters and styles: pure, so that it can be looked at without a terminal."""

import math
from dataclasses import dataclass, field

from rlhf_tui.state.series import Series
from rlhf_tui.state.session_state import MARKER_GLYPHS, Marker
from rlhf_tui.widgets.charts.raster import BRAILLE, Column, Raster, Scale, column_of, decimate

STYLES = (
    "", "dim", "title", "value", "focus", "s1", "s2", "s3", "s4", "s5", "s6",
    "raw", "past", "target", "rule", "command", "checkpoint", "attempt", "alert", "note",
)  # fmt: skip
STYLE = {name: i for i, name in enumerate(STYLES)}
BAND, CURSOR, BAR, FOCUS = 32, 64, 128, 256
GROUNDS = {BAND: "band", CURSOR: "crosshair", BAR: "title", FOCUS: "focus"}
"""Flags beside a style's number, and whose background each of them stands for."""
GUTTER = 8
PRIORITY = ("checkpoint", "attempt", "note", "command", "alert")
"""Where markers share a cell the last of these is seen."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    series: Series
    style: str


@dataclass(frozen=True)
class Plot:
    """Everything a chart shows."""

    title: str
    value: str
    first: float
    last: float
    lines: list[Line] = field(default_factory=list)
    """Drawn in this order, the last on top."""
    legend: list[str] = field(default_factory=list)
    """Styles of the names in the title, where there are several."""
    unit: str = ""
    note: str = ""
    """How it is drawn; before the unit where there is no room for both."""
    log: bool = False
    target: float | None = None
    band: float = 0.2
    """Half the height of the target's band, as a share of the target."""
    markers: list[Marker] = field(default_factory=list)
    cursor: int | None = None
    focused: bool = False
    empty: str = "no values yet"


class Canvas:
    """Rows of characters with their styles."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.chars = [[" "] * width for _ in range(height)]
        self.styles = [[0] * width for _ in range(height)]

    def write(self, x: int, y: int, text: str, style: int) -> None:
        """Puts text into a row, cut at its ends."""
        for i, char in enumerate(text, start=x):
            if 0 <= i < self.width:
                self.chars[y][i] = char
                self.styles[y][i] = style

    def row_text(self, y: int) -> str:
        """A row as text."""
        return "".join(self.chars[y])


def paint(plot: Plot, width: int, height: int) -> Canvas:
    """The picture of a chart: title, curves with their scale, axis with its markers."""
    picture = Canvas(width, height)
    _title(picture, plot)
    cells, rows = width - GUTTER, height - 2
    if cells < 4 or rows < 1:
        return picture
    columns = [(decimate(x.series, plot.first, plot.last, cells * 2), x.style) for x in plot.lines]
    scale = scale_of([c for c, _ in columns], plot)
    if scale is None:
        picture.write(GUTTER, 1 + rows // 2, plot.empty[: cells - 1], STYLE["dim"])
    else:
        _curves(picture, plot, columns, scale, cells, rows)
        for y, label in labels(scale, rows):
            picture.write(0, 1 + y, label.rjust(GUTTER - 1), STYLE["dim"])
    _axis(picture, plot, cells, rows)
    return picture


def _title(picture: Canvas, plot: Plot) -> None:
    bar, value = ("focus", "focus") if plot.focused else ("title", "value")
    # The mark says what the colour says, for those who see no colour.
    name = f"{'▸' if plot.focused else ' '}{plot.title}"
    picture.write(0, 0, " " * picture.width, STYLE[bar])
    room = picture.width - len(plot.value) - 2
    picture.write(0, 0, name[:room], STYLE[bar])
    _legend(picture, plot, name[:room])
    for extra in (f"{plot.unit}  {plot.note}", plot.note, plot.unit):
        if extra.strip() and len(name) + 2 + len(extra.strip()) < room:
            picture.write(len(name) + 2, 0, extra.strip(), STYLE[bar])
            break
    picture.write(picture.width - len(plot.value) - 1, 0, plot.value, STYLE[value])


def _legend(picture: Canvas, plot: Plot, shown: str) -> None:
    """Several names in a title have the colours of their curves."""
    if len(plot.legend) < 2:
        return
    flag, at = FOCUS if plot.focused else BAR, 1
    for name, style in zip(plot.title.split(" + "), plot.legend, strict=False):
        picture.write(at, 0, shown[at : at + len(name)], STYLE[style] | flag)
        at += len(name) + 3


def _curves(
    picture: Canvas,
    plot: Plot,
    columns: list[tuple[list[Column], str]],
    scale: Scale,
    cells: int,
    rows: int,
) -> None:
    raster = Raster(cells, rows)
    band_rows = _target(raster, plot, scale)
    for found, style in columns:
        raster.draw(found, scale, STYLE[style])
    ruled = {
        x
        for m in plot.markers
        if m.kind != "checkpoint" and (x := _cell(m.step, plot, cells)) is not None
    }
    cursor = None if plot.cursor is None else _cell(plot.cursor, plot, cells)
    for y in range(rows):
        chars, styles = picture.chars[1 + y], picture.styles[1 + y]
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


def _target(raster: Raster, plot: Plot, scale: Scale) -> range:
    """Dotted edges of the target's band, for those who see no colour; the rows it covers."""
    if plot.target is None:
        return range(0)
    rows = raster.height * 4
    low, high = plot.target * (1 - plot.band), plot.target * (1 + plot.band)
    if low > scale.high or high < scale.low:
        return range(0)
    top, bottom = scale.row(high, rows), scale.row(low, rows)
    for x in range(0, raster.width * 2, 4):
        for y, inside in ((top, high <= scale.high), (bottom, low >= scale.low)):
            if inside:
                raster.fill(x, y, y, STYLE["target"])
    return range(top // 4, bottom // 4 + 1)


def _axis(picture: Canvas, plot: Plot, cells: int, rows: int) -> None:
    y = 1 + rows
    first, last = steps_text(plot.first), steps_text(plot.last)
    both = f"{first}–{last}"
    label = both if len(both) < GUTTER else first
    picture.write(0, y, label.rjust(GUTTER - 1), STYLE["dim"])
    picture.write(GUTTER, y, "─" * cells, STYLE["dim"])
    if label == first:
        picture.write(picture.width - len(last) - 1, y, f" {last}", STYLE["dim"])
    for kind in PRIORITY:
        for marker in plot.markers:
            x = _cell(marker.step, plot, cells) if marker.kind == kind else None
            if x is not None:
                picture.write(GUTTER + x, y, MARKER_GLYPHS[kind], STYLE[kind])
    if plot.cursor is not None and (x := _cell(plot.cursor, plot, cells)) is not None:
        label = steps_text(plot.cursor)
        at = min(max(GUTTER + x - len(label) // 2, GUTTER), picture.width - len(label))
        picture.write(at, y, label, STYLE["rule"])


def _cell(step: float, plot: Plot, cells: int) -> int | None:
    """The cell of a step; None outside the window."""
    if not plot.first <= step <= plot.last:
        return None
    return column_of(step, plot.first, plot.last, cells * 2) // 2


def scale_of(columns: list[list[Column]], plot: Plot) -> Scale | None:
    """A scale that holds everything, with round ends; None where there is nothing."""
    lows = [c.low for found in columns for c in found]
    highs = [c.high for found in columns for c in found]
    if not lows:
        return None
    low, high = min(lows), max(highs)
    # A target far above everything would squeeze the curve: it is then left to the numbers.
    if plot.target is not None and plot.target * (1 + plot.band) <= 2.5 * high:
        low = min(low, plot.target * (1 - plot.band))
        high = max(high, plot.target * (1 + plot.band))
    if plot.log and high > 0:
        positive = [v for v in (*lows, *highs) if v > 0]
        low = max(low, min(positive), high * 1e-9)
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return Scale(10.0**bottom, 10.0 ** max(top, bottom + 1), log=True)
    if low < 0 < high and -low * 50 < high - low:
        low = 0.0  # less than a dot: an estimate of what is never negative
    if high == low:
        half = abs(low) * 0.1 or 0.5
        low, high = (0.0, 1.0) if low == 0 else (low - half, high + half)
    grid = _round_up((high - low) / 4)
    return Scale(math.floor(low / grid + 1e-9) * grid, math.ceil(high / grid - 1e-9) * grid)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * (1 - 1e-9))


def labels(scale: Scale, rows: int) -> list[tuple[int, str]]:
    """(row, text) of the scale's labels: both ends, and more where there is room."""
    count = 2 if rows < 5 else 3 if rows < 10 else 5
    values = [scale.value(i / (count - 1)) for i in range(count)]
    span = scale.high - scale.low
    # As few decimals as tell them apart rightly; a logarithmic scale has its own for each.
    digits = next(
        (d for d in range(6) if all(abs(round(v, d) - v) < span * 1e-3 for v in values)), 6
    )
    return [
        (scale.row(v, rows * 4) // 4, axis_text(v, None if scale.log else digits)) for v in values
    ]


def axis_text(value: float, digits: int | None) -> str:
    """A value in seven characters, with so many decimals, or as many as it needs (None)."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        return f"{value:.1e}"
    text = f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    return text if len(text) < GUTTER else f"{value:.3g}"


def steps_text(step: float) -> str:
    """A step's number, short enough for an axis."""
    whole = round(step)
    return f"{whole:,}" if whole < 1e6 else f"{whole / 1e6:.2f}M"
