"""One curve as an SVG picture for a page, with the interventions and alerts drawn in.

Colours are classes, which the style sheet of the page resolves; text is escaped.
"""

import math
from collections.abc import Sequence
from html import escape

from msgspec import Struct

from rlhf_tui.report.curves import Curve, Point
from rlhf_tui.state.series import bounded, is_flat
from rlhf_tui.text import one_line

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 30, 176
"""Edges of the plot, in units of the picture."""
TICKS = 5
SMOOTHED_SHARE = 40
"""The moving mean spans one part in this many of the points to each side."""
MIN_SMOOTHED_POINTS = 30
"""Points from which on a measured curve has a moving mean."""
DOTTED_BELOW = 40
"""A curve of fewer points has a dot at each, such as that of evaluations."""
LABEL_WIDTH = 15
"""Room for the number of an intervention."""
TITLE_CHARACTERS = 40
"""Maximum length of a mark's tooltip. Every chart repeats it, and size counts."""


TEXT = 'font-family="sans-serif" font-size="11"'
LOOKS = {
    "grid": 'stroke="#d8dde3"',
    "tick": f'fill="#5b6570" {TEXT}',
    "raw": 'fill="none" stroke="#a9c4ec"',
    "mean": 'fill="none" stroke="#1f5fbf" stroke-width="1.8"',
    "ghost": 'fill="none" stroke="#b9bec5"',
    "other": 'fill="none" stroke="#c2410c" stroke-width="1.8"',
    "dot": 'fill="#1f5fbf"',
    "intervention": 'stroke="#7a3fa0" stroke-dasharray="4 3"',
    "start": 'stroke="#5b6570" stroke-dasharray="1 3"',
    "number": f'fill="#7a3fa0" font-weight="bold" {TEXT}',
    "alert": 'fill="#b45309"',
}
"""Class → its look where the page's style sheets do not reach into a picture. A style sheet takes
precedence over these attributes."""


class Mark(Struct, frozen=True):
    """A vertical line of the chart."""

    step: int
    label: str
    """The number of an intervention; empty for an alert or a start."""
    title: str
    """Shown when the pointer rests on it; not of alerts, which can be many."""
    kind: str
    """`intervention`, `alert` or `start`."""


class Scale(Struct, frozen=True):
    """Maps steps and values to the plot."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        """The horizontal position of a step."""
        return LEFT + (RIGHT - LEFT) * (step - self.first) / ((self.last - self.first) or 1)

    def y(self, value: float) -> float:
        """The vertical position of a value."""
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / ((self.high - self.low) or 1)


def chart(curve: Curve, marks: Sequence[Mark], last_step: int) -> str:
    """The picture of a curve.

    Args:
        curve: at least one point.
        marks: in the order of their steps; those at the same position are drawn once.
        last_step: of the run, so that all charts have the same steps.
    """
    scale = _scale(curve, last_step)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_text(curve.title)}">',
        *_axes(scale),
        *_marks(marks, scale),
        *(_line(_drawn(points), scale, "ghost") for points in curve.branches),
        *_other(curve, scale),
        *_curve(curve, scale),
        "</svg>",
    ]
    return "\n".join(parts)


def _look(name: str) -> str:
    return f'class="{name}" {LOOKS[name]}'


def _scale(curve: Curve, last_step: int) -> Scale:
    all_points = (curve.points, curve.other, *curve.branches)
    values = [v for points in all_points for _, v in _drawn(points)] or [0.0]
    low, high = min(values), max(values)
    room = abs(high) * 0.1 or 1.0 if is_flat(low, high) else (high - low) * 0.06
    bottom = low if low == 0 else low - room
    first = min(curve.points[0][0], 1)
    last_step = max(last_step, *(step for step, _ in curve.other[-1:]), first + 1)
    return Scale(first, last_step, bottom, high + room)


def _text(text: str) -> str:
    return escape(one_line(text, TITLE_CHARACTERS))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within an interval, about :data:`TICKS` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / width)
    return [k * width for k in range(first, math.floor(high / width) + 1)]


def tick_label(value: float, distance: float) -> str:
    """A round number with the decimals that the distance between ticks needs."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(distance or abs(value)))
        return f"{value:.{max(1, digits)}e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9)) if distance else 2
    exact = math.isclose(distance * 10**decimals, round(distance * 10**decimals))
    return f"{value:,.{decimals if exact else decimals + 1}f}"


def _axes(scale: Scale) -> list[str]:
    parts = []
    values = ticks(scale.low, scale.high)
    distance = values[1] - values[0] if len(values) > 1 else 0.0
    for value in values:
        y = scale.y(value)
        parts += [
            f'<path {_look("grid")} d="M{LEFT} {y:.1f}H{RIGHT}"/>',
            f'<text {_look("tick")} x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
            f"{tick_label(value, distance)}</text>",
        ]
    return parts + [
        f'<text {_look("tick")} x="{scale.x(step):.1f}" y="{BOTTOM + 16}" '
        f'text-anchor="{"end" if scale.x(step) > RIGHT - LABEL_WIDTH else "middle"}">'
        f"{step:,.0f}</text>"
        for step in ticks(scale.first, scale.last)
        if step == int(step)
    ]


def _marks(marks: Sequence[Mark], scale: Scale) -> list[str]:
    parts, drawn, ends = [], set(), [-math.inf, -math.inf]
    for mark in marks:
        if not scale.first <= mark.step <= scale.last:
            continue
        x = scale.x(mark.step)
        if (mark.kind, round(x)) in drawn:
            continue
        drawn.add((mark.kind, round(x)))
        if mark.kind == "alert":
            parts.append(f'<path {_look("alert")} d="M{x:.1f} {BOTTOM - 7}l4 7h-8z"/>')
            continue
        line = f'<path {_look(mark.kind)} d="M{x:.1f} {TOP}V{BOTTOM}"/>'
        # Two rows of labels; a label without room is left out, its line is drawn all the same.
        row = next((r for r, end in enumerate(ends) if x - LABEL_WIDTH / 2 >= end), None)
        if mark.label and row is not None:
            ends[row] = x + LABEL_WIDTH / 2 + 1
            line += (
                f'<text {_look("number")} x="{x:.1f}" y="{TOP - 4 - 12 * row}" '
                f'text-anchor="middle">{_text(mark.label)}</text>'
            )
        parts.append(f"<g><title>{_text(mark.title)}</title>{line}</g>" if mark.title else line)
    return parts


def _curve(curve: Curve, scale: Scale) -> list[str]:
    points = _drawn(curve.points)
    if not points:
        return []
    if len(points) < DOTTED_BELOW:
        dots = [
            f'<circle {_look("dot")} cx="{scale.x(s):.1f}" cy="{scale.y(v):.1f}" r="2.5"/>'
            for s, v in points
        ]
        return [_line(points, scale, "mean"), *dots]
    if curve.is_set or len(points) < MIN_SMOOTHED_POINTS:
        return [_line(points, scale, "mean")]
    return [_line(points, scale, "raw"), _line(moving_mean(points), scale, "mean")]


def _other(curve: Curve, scale: Scale) -> list[str]:
    points = _drawn(curve.other)
    if not points:
        return []
    smooth = not curve.is_set and len(points) >= MIN_SMOOTHED_POINTS
    return [_line(moving_mean(points) if smooth else points, scale, "other")]


def moving_mean(points: Sequence[Point]) -> list[Point]:
    """The mean around each point; at the ends, over fewer points on either side."""
    reach = max(2, len(points) // SMOOTHED_SHARE)
    means = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        means.append((step, sum(v for _, v in points[i - near : i + near + 1]) / (2 * near + 1)))
    return means


def _drawn(points: Sequence[Point]) -> list[Point]:
    """The points with a finite value, bounded, so that scales and means do not overflow."""
    return [(step, bounded(value)) for step, value in points if math.isfinite(value)]


def _line(points: Sequence[Point], scale: Scale, name: str) -> str:
    spots = " ".join(f"{scale.x(s):.1f},{scale.y(v):.1f}" for s, v in points)
    return f'<polyline {_look(name)} points="{spots}"/>'
