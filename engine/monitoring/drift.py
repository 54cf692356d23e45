"""A sequential test for slow drift: a one-sided CUSUM against the run's own first steps.

A mean of the last steps drifts along with a slow collapse; the first steps do not. The test sums
how far each value lies beyond the allowed change, in units of the noise from one step to the next,
and restarts at 0 whenever the sum would be negative (E. S. Page, "Continuous inspection schemes",
Biometrika 41, 1954). Median and noise are robust: one bad step changes neither.
"""

from itertools import pairwise
from statistics import median

CUSUM_LIMIT = 8.0
"""The sum at which a drift is certain, in units of the noise."""
MIN_NOISE = 0.02
"""The noise is at least this share of the baseline: a metric may hardly vary in the first steps."""
DIFFERENCE_TO_DEVIATION = 1.0484
"""The standard deviation of Gaussian noise over the median distance of successive values."""


class DriftTest:
    """The test of one metric in one direction."""

    def __init__(self, sign: int, fraction: float, window: int) -> None:
        """Before the first step.

        Args:
            sign: 1 for a drift upwards, -1 downwards.
            fraction: of the baseline; changes up to it are allowed.
            window: number of first steps whose median is the baseline.
        """
        self._sign = sign
        self._fraction = fraction
        self._window = window
        self._first: list[float] = []
        self._noise = 0.0
        self.baseline: float | None = None
        """The median of the first steps; None until they are known."""
        self.total = 0.0
        """The sum; at most twice :data:`CUSUM_LIMIT`, so that it ends soon after a recovery."""
        self.since: int | None = None
        """The step at which the sum left 0; None while it is 0."""
        self.excess = 0.0
        """How far the last value is beyond what is allowed."""

    @property
    def found(self) -> bool:
        """Whether there is a drift."""
        return self.total > CUSUM_LIMIT

    @property
    def allowed(self) -> float:
        """The change that is allowed, in the metric's unit."""
        return max(self._fraction * abs(self.baseline or 0.0), self._noise)

    def add(self, step: int, value: float) -> None:
        """Adds a step's finite value. A baseline of 0 has no fractions, so nothing is tested."""
        if self.baseline is None:
            self._learn(value)
            return
        if self.baseline == 0:
            return
        self.excess = self._sign * (value - self.baseline) - self.allowed
        self.total = min(max(self.total + self.excess / self._noise, 0.0), 2 * CUSUM_LIMIT)
        if not self.total:
            self.since = None
        elif self.since is None:
            self.since = step

    def _learn(self, value: float) -> None:
        self._first.append(value)
        if len(self._first) < self._window:
            return
        self.baseline = median(self._first)
        changes = [abs(b - a) for a, b in pairwise(self._first)]
        noise = DIFFERENCE_TO_DEVIATION * median(changes) if changes else 0.0
        self._noise = max(noise, MIN_NOISE * abs(self.baseline))
