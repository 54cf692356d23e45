"""One metric over the steps, with extremes that are quick to compute at any width."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

BLOCK_POINTS = 64
"""Points for which one pair of extremes is stored."""
FLAT_RANGE = 1e-9
"""Relative range of a curve's values up to which it is drawn flat: they differ only by rounding."""
MAX_MAGNITUDE = 1e300
"""Largest magnitude of a value that is drawn; its inverse is the smallest."""


def bounded(value: float) -> float:
    """Clamps a value so that its sums, differences and logarithm neither overflow nor underflow.

    Args:
        value: any value, including infinities; not NaN.
    """
    return 0.0 if abs(value) < 1 / MAX_MAGNITUDE else min(max(value, -MAX_MAGNITUDE), MAX_MAGNITUDE)


def is_flat(low: float, high: float) -> bool:
    """Whether values from `low` to `high` differ only by rounding."""
    return high - low <= FLAT_RANGE * max(abs(low), abs(high))


class Series:
    """Values by increasing step, bounded by :data:`MAX_MAGNITUDE`, without undefined ones."""

    def __init__(
        self, points: Iterable[tuple[float, float | None]] = (), *, fractional: bool = False
    ) -> None:
        """With `fractional`, steps need not be whole, as those of one run in steps of another."""
        self._ends_undefined = False
        self.steps: array[float] = array("d" if fractional else "q")
        self.values = array("d")
        self._low = array("d")
        self._high = array("d")
        self.extend(points)

    def __len__(self) -> int:
        return len(self.steps)

    def extend(self, points: Iterable[tuple[float, float | None]]) -> None:
        """Appends points that lie after all existing ones."""
        points = list(points)
        values = [value for _, value in points]
        if points:
            newest = values[-1]
            self._ends_undefined = newest is None or not math.isfinite(newest)
        # Fast path: a finite sum shows that there is no NaN, which holds for nearly all metrics.
        # `None in values` narrows nothing for mypy, here and below.
        if None in values or not math.isfinite(sum(values)):  # type: ignore[arg-type]  # None is tested first
            points = [p for p in points if p[1] is not None and math.isfinite(p[1])]
            values = [value for _, value in points]
        if points:
            steps = array(self.steps.typecode, [step for step, _ in points])
            self._append(steps, array("d", values))  # type: ignore[arg-type]  # no None here

    def _append(self, steps: "array[float]", values: "array[float]") -> None:
        self.steps.extend(steps)
        self.values.extend(values)
        # The last block may be incomplete; it and all later blocks are computed again.
        first = max(0, len(self._low) - 1)
        del self._low[first:], self._high[first:]
        for start in range(first * BLOCK_POINTS, len(self.values), BLOCK_POINTS):
            block = self.values[start : start + BLOCK_POINTS]
            low, high = min(block), max(block)
            if low < -MAX_MAGNITUDE or high > MAX_MAGNITUDE:
                self.values[start : start + BLOCK_POINTS] = array("d", map(bounded, block))
                low, high = bounded(low), bounded(high)
            self._low.append(low)
            self._high.append(high)

    def extremes(self, first: int, end: int) -> tuple[float, float]:
        """The lowest and highest value of points `first` to `end` - 1 (at least one)."""
        block, last = -(-first // BLOCK_POINTS), end // BLOCK_POINTS
        if block >= last:
            part = self.values[first:end]
            return min(part), max(part)
        low, high = min(self._low[block:last]), max(self._high[block:last])
        for start, stop in ((first, block * BLOCK_POINTS), (last * BLOCK_POINTS, end)):
            if start < stop:
                part = self.values[start:stop]
                low, high = min(low, *part), max(high, *part)
        return low, high

    def between(self, first: float, last: float) -> tuple[int, int]:
        """The slice of points whose steps lie in [first, last]."""
        return bisect_left(self.steps, first), bisect_right(self.steps, last)

    def at(self, step: float) -> float | None:
        """The value at a step; None where it is undefined."""
        i = bisect_left(self.steps, step)
        return self.values[i] if i < len(self.steps) and self.steps[i] == step else None

    def latest(self, step: int) -> float | None:
        """The value at a step, or at the last step before it that has one."""
        i = bisect_right(self.steps, step)
        return self.values[i - 1] if i else None

    def interpolated(self, step: float) -> float | None:
        """The value on the straight line between two neighbours; None outside all points."""
        i = bisect_right(self.steps, step)
        if not 0 < i < len(self.steps):
            return None
        share = (step - self.steps[i - 1]) / (self.steps[i] - self.steps[i - 1])
        return self.values[i - 1] + share * (self.values[i] - self.values[i - 1])

    def mean(self, first: float, last: float) -> float | None:
        """The mean over the steps in [first, last]; None where there are none."""
        i, j = self.between(first, last)
        return sum(self.values[i:j]) / (j - i) if j > i else None

    @property
    def last(self) -> float | None:
        """The value of the newest step; None if it is undefined."""
        return self.values[-1] if self.values and not self._ends_undefined else None


class Smoothed(Series):
    """The exponential moving average of another series.

    It starts at the first value: ``mean += (1 - weight) * (value - mean)``.
    """

    def __init__(self, source: Series, weight: float) -> None:
        super().__init__()
        self.source = source
        self.weight = weight
        self.follow()

    def follow(self) -> None:
        """Appends the averages of new points of the source."""
        begin = len(self)
        if begin == len(self.source):
            return
        mean = self.values[-1] if begin else self.source.values[0]
        take = 1 - self.weight
        means = array("d")
        add = means.append
        for value in self.source.values[begin:]:
            mean += take * (value - mean)
            add(mean)
        self._append(self.source.steps[begin:], means)
