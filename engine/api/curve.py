"""Curves of metrics as arrays of the standard library.

``numpy.asarray(curve.values)`` shares their memory, and matplotlib and pandas take them as they
are. numpy itself is not imported, which keeps the import of the API short.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Curve:
    """One metric over the steps of a run's current timeline."""

    name: str
    """As in docs/metrics.md, such as `objective/kl`."""
    steps: "array[int]"
    """Increasing; int64."""
    values: "array[float]"
    """One value per step; float64. NaN where the metric was not finite."""

    def __len__(self) -> int:
        """The number of points."""
        return len(self.steps)


def as_curve(name: str, points: Iterable[tuple[int, float | None]]) -> Curve:
    """Builds a curve from the journal's (step, value) points, in their order."""
    steps, values = array("q"), array("d")
    for step, value in points:
        steps.append(step)
        values.append(math.nan if value is None else value)
    return Curve(name, steps, values)


def aligned(curves: Sequence[Curve]) -> "dict[str, array[int] | array[float]]":
    """Aligns curves over the union of their steps.

    Returns:
        `step` → the steps; the name of each curve → its values, NaN at steps it does not have.
        All arrays have the same length.
    """
    steps = array("q", sorted({step for curve in curves for step in curve.steps}))
    columns: dict[str, array[int] | array[float]] = {"step": steps}
    for curve in curves:
        columns[curve.name] = _over(steps, dict(zip(curve.steps, curve.values, strict=True)))
    return columns


def _over(steps: "array[int]", values: Mapping[int, float]) -> "array[float]":
    return array("d", (values.get(step, math.nan) for step in steps))
