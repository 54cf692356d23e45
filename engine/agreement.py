"""How far scores agree with people's judgements, and from which step on they agree less.

A judgement is a label on a response (good; bad and hack count as the opposite) or a preference
between two responses. Each has an agreement from 0 to 1:

- A preference: 1 if the chosen response scores higher, ½ if both score alike.
- A label `good`: the share of the responses with the opposite label that score lower; ties count
  half. A label of the other kind: the share of the good responses that score higher. These are the
  placement values of DeLong et al. 1988; the mean of either kind is the probability that a good
  response scores higher than another one, the area under the ROC curve. No threshold is needed, so
  a policy whose scores rise while its responses get worse shows as disagreement.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from msgspec import Struct

WINDOW = 20
"""Number of newest judgements up to a step whose mean is the curve's value at the step."""
MIN_JUDGEMENTS = 20
"""Minimum number of judgements to look for a fall."""
TRIMMED = 0.15
"""Share of the judgements at either end at which no fall is looked for."""
CRITICAL = math.sqrt(8.68)
"""The sup-Wald statistic of a change of one mean is above 8.68 in 5 % of all series without a
change, with 15 % trimmed (Andrews 2003, "Tests for parameter instability: a corrigendum"). Only a
fall counts, so the error is half of that."""


class JudgedScore(Struct, frozen=True):
    """The score of a labelled response."""

    step: int
    score: float
    good: bool


class Point(Struct, frozen=True):
    """The agreement of the scores with one judgement."""

    step: int
    agreement: float


class Fall(Struct, frozen=True):
    """A lasting fall of the agreement."""

    step: int
    """The first step of the judgements after it."""
    before: float
    """Mean agreement."""
    after: float


class Agreement(Struct, frozen=True, kw_only=True):
    """The agreement with all judgements of a session. Empty without judgements to compare."""

    points: list[Point] = []
    """One for each judgement, by step."""
    fall: Fall | None = None
    problem: str = ""
    """Why the judgements cannot be read."""

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Agreement":
        """Sorts the points and looks for a fall."""
        ordered = sorted(points, key=lambda p: p.step)
        return cls(points=ordered, fall=find_fall(ordered))

    @property
    def mean(self) -> float | None:
        """Over all judgements; None without any."""
        return _mean([p.agreement for p in self.points]) if self.points else None

    @property
    def curve(self) -> list[tuple[int, float]]:
        """For each step with a judgement, the mean of the last :data:`WINDOW` up to that step."""
        last = {p.step: i for i, p in enumerate(self.points, start=1)}
        return [
            (step, _mean([p.agreement for p in self.points[max(0, end - WINDOW) : end]]))
            for step, end in last.items()
        ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # the app starts faster without the module statistics


def placements(scores: Sequence[JudgedScore]) -> list[Point]:
    """The agreement with each label; empty if all labels are of one kind.

    Args:
        scores: must be comparable, i.e. from the same reward.
    """
    good = sorted(s.score for s in scores if s.good)
    bad = sorted(s.score for s in scores if not s.good)
    if not good or not bad:
        return []
    return [
        Point(s.step, _share_below(s.score, bad) if s.good else 1 - _share_below(s.score, good))
        for s in scores
    ]


def _share_below(score: float, others: Sequence[float]) -> float:
    """The share of sorted numbers below one; equal ones count half."""
    return (bisect_left(others, score) + bisect_right(others, score)) / (2 * len(others))


def preference_agreement(chosen: float, rejected: float) -> float:
    """The agreement with a preference, given both scores."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def find_fall(points: Sequence[Point]) -> Fall | None:
    """Finds where the mean falls most clearly, if it falls beyond chance.

    Compares the means before and after each step (the sup-Wald test of Andrews 1993), with the
    variance within both parts.

    Args:
        points: sorted by step.
    """
    count = len(points)
    if count < MIN_JUDGEMENTS:
        return None
    values = [p.agreement for p in points]
    margin = math.ceil(TRIMMED * count)
    total, squares = math.fsum(values), math.fsum(v * v for v in values)
    found, highest, left = None, CRITICAL, 0.0
    for i in range(1, count - margin + 1):
        left += values[i - 1]
        if i < margin or points[i].step == points[i - 1].step:
            continue
        before, after = left / i, (total - left) / (count - i)
        within = squares - i * before**2 - (count - i) * after**2
        error = math.sqrt(max(within, 0.0) / (count - 2) * (1 / i + 1 / (count - i)))
        statistic = (before - after) / max(error, 1e-9)
        if statistic > highest:
            found, highest = Fall(points[i].step, before, after), statistic
    return found


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` judgements (Wilson 1927)."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return max(0.0, centre - half), min(1.0, centre + half)
