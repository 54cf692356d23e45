"""The vertical axis of a chart: its scale, and the labels that fit."""

import math
from itertools import pairwise

from rlhf_tui import format as fmt
from rlhf_tui.state.series import bounded, is_flat
from rlhf_tui.widgets.charts.raster import Column, Scale

TARGET_BAND = 0.2
"""Half the height of the target's band, relative to the target."""
GUTTER = 8
"""Cells left of the curves, for the labels."""
MAX_LABELS = 6
"""Labels of a vertical axis at most."""


def scale_of(
    columns: list[list[Column]], *, target: float | None = None, log: bool = False
) -> Scale | None:
    """A scale with round ends that contains all values; None without values.

    Args:
        columns: of each curve.
        target: the centre of a band to show.
        log: a logarithmic scale.
    """
    lows = [c.low for line in columns for c in line]
    highs = [c.high for line in columns for c in line]
    if not lows:
        return None
    low, high = bounded(min(lows)), bounded(max(highs))
    # A target far above all values would flatten the curve: the scale then leaves it out.
    if target is not None and target * (1 + TARGET_BAND) <= 2.5 * high:
        low = min(low, target * (1 - TARGET_BAND))
        high = max(high, target * (1 + TARGET_BAND))
    if log and high > 0:
        positive = [v for v in (*lows, *highs) if v > 0]
        low = max(low, bounded(min(positive)), high * 1e-9)
        return _log_scale(low, high)
    if low < 0 < high and -low * 50 < high - low:
        low = 0.0  # less than a dot below 0: noise of an estimate of a non-negative quantity
    if is_flat(low, high):  # the ends of so small a scale would have the same label
        half = abs(low) * 0.1 or 0.5
        low, high = (0.0, 1.0) if low == 0 else (low - half, high + half)
    grid = _round_up((high - low) / 4)
    low, high = math.floor(low / grid + 1e-9) * grid, math.ceil(high / grid - 1e-9) * grid
    return Scale(low, high, grid=grid)


def _log_scale(low: float, high: float) -> Scale:
    """A logarithmic scale; its ends are 1, 2 or 5 times a power of ten, far apart just powers."""
    factors = (1, 10) if high > 100 * low else (1, 2, 5, 10)
    bottom, top = 1 / _round_up(1 / low, factors), _round_up(high, factors)
    if top < bottom * 1.5:  # all values are one round number
        top = _round_up(top * 1.5, factors)
    return Scale(bottom, top, log=True)


def _round_up(value: float, factors: tuple[float, ...] = (1, 2, 2.5, 5, 10)) -> float:
    """Rounds up to one of the factors times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in factors if m * power >= value * (1 - 1e-9))


def labels(scale: Scale, rows: int) -> list[tuple[int, str]]:
    """(row, text) of the labels of a scale, the lowest first: as many as fit, at most six."""
    values = _labelled(scale, rows)
    span = scale.high - scale.low
    # The fewest decimals that show all labels correctly; on a logarithmic scale they differ.
    digits = next(
        (d for d in range(6) if all(abs(round(v, d) - v) < span * 1e-3 for v in values)), 6
    )
    return [
        (scale.row(v, rows * 4) // 4, axis_text(v, None if scale.log else digits)) for v in values
    ]


def _labelled(scale: Scale, rows: int) -> list[float]:
    """The ends of the scale if there are few rows; else all or every other value of its grid.

    On a logarithmic scale: 1, 2 and 5 times powers of ten, or just powers.
    """
    if rows < 5:
        return [scale.low, scale.high]
    if scale.log:
        return _labelled_log(scale, rows)
    cells = round((scale.high - scale.low) / scale.grid)
    # At least two rows from one label to the next: of less, some would be even and some not.
    stride = 1 if rows > 2 * cells else 2
    if stride == 2 and (cells == 3 or rows <= cells):
        return [scale.low, scale.high]
    return [scale.low + i * scale.grid for i in range(0, cells + 1, stride)]


def _labelled_log(scale: Scale, rows: int) -> list[float]:
    """The ends, and between them the most round values that are two rows apart or more."""
    bottom, top = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    choices = [[m * 10.0**e for e in range(bottom, top) for m in (1, 2, 5)]]
    choices += [[10.0**e for e in range(bottom, top, n)] for n in range(1, top - bottom + 1)]
    for choice in choices:
        inner = [v for v in choice if scale.low * 1.01 < v < scale.high / 1.01]
        values = [scale.low, *inner, scale.high]
        at = [scale.row(v, rows * 4) // 4 for v in values]
        if len(values) <= MAX_LABELS and all(a - b >= 2 for a, b in pairwise(at)):
            return values
    return [scale.low, scale.high]


def axis_text(value: float, digits: int | None) -> str:
    """A value in at most seven characters, with `digits` decimals; None: as many as needed."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        return fmt.scientific(value, 1)
    text = f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    if len(text) == GUTTER and text.startswith("0."):
        text = text[1:]
    return text if len(text) < GUTTER else f"{value:.3g}"
