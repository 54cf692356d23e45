"""Predicts a metric by a straight line through its last steps."""

from collections.abc import Sequence
from dataclasses import dataclass

STEPS_AHEAD = 10
"""Steps ahead that a value is predicted for."""
MIN_SLOPE = 4.0
"""Minimum slope for a prediction, in standard errors: noise alone seldom rises so steadily."""


@dataclass(frozen=True)
class Line:
    """A straight line fitted to values at steps of distance 1."""

    last: float
    """Its value at the last step."""
    slope: float
    """Per step."""
    error: float
    """The standard error of the slope."""

    @property
    def predicted(self) -> float | None:
        """The value in :data:`STEPS_AHEAD` steps; None if the slope may be noise."""
        certain = self.slope > MIN_SLOPE * self.error
        return self.last + STEPS_AHEAD * self.slope if certain else None


def line_through(values: Sequence[float]) -> Line:
    """The least squares line through at least 3 values, oldest first."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    squares = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / squares
    errors = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    # Not a power of the errors, which raises OverflowError for huge ones.
    variance = sum(error * error for error in errors) / (count - 2)
    return Line(mean + slope * middle, slope, (variance / squares) ** 0.5)
