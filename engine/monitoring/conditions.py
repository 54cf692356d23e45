"""The kinds of condition that a guard rail can have: one function for each key of a rule.

To add one, write a function of :data:`Condition`'s signature, enter it in :data:`CONDITIONS`, and
declare its key in :class:`engine.config.schema.Rule`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config.schema import Rule


@dataclass(frozen=True)
class Observation:
    """What there is to know about a rule's metric when a step is done."""

    value: float
    """Of the step; finite."""
    scale: float | None
    """The setting that the rule is relative to, 1 where it is absolute; None: not to be used."""
    window: Sequence[float]
    """The values of the steps before, `rule.window` of them at most, oldest first."""


Condition = Callable[[Rule, Observation], str | None]
"""What is to be said of the metric (`is 3, above 2`), or None where the condition does not hold."""


def above(rule: Rule, seen: Observation) -> str | None:
    """The value is over a bound."""
    if rule.above is None or seen.scale is None or seen.value <= rule.above * seen.scale:
        return None
    return f"is {seen.value:.4g}, above {rule.above:g}{_unit(rule, seen.scale)}"


def below(rule: Rule, seen: Observation) -> str | None:
    """The value is under a bound."""
    if rule.below is None or seen.scale is None or seen.value >= rule.below * seen.scale:
        return None
    return f"is {seen.value:.4g}, below {rule.below:g}{_unit(rule, seen.scale)}"


def falls(rule: Rule, seen: Observation) -> str | None:
    """The value is lower than the window's mean, by a share of it."""
    if rule.falls is None or (found := _against_mean(rule, seen)) is None:
        return None
    change, words = found
    return f"fell by {-change:.0%} to {seen.value:.4g} {words}" if change < -rule.falls else None


def rises(rule: Rule, seen: Observation) -> str | None:
    """The value is higher than the window's mean, by a share of it."""
    if rule.rises is None or (found := _against_mean(rule, seen)) is None:
        return None
    change, words = found
    return f"rose by {change:.0%} to {seen.value:.4g} {words}" if change > rule.rises else None


CONDITIONS: dict[str, Condition] = {
    "above": above,
    "below": below,
    "falls": falls,
    "rises": rises,
}
"""Key of a rule → its condition. A rule says what the first one that holds says."""


def not_finite(metrics: dict[str, float | None]) -> str | None:
    """The condition of a rule over `*`: some metric is infinite or not a number."""
    bad = [k for k, v in metrics.items() if v is not None and not math.isfinite(v)]
    return f"{', '.join(bad)} not finite" if bad else None


def _unit(rule: Rule, scale: float) -> str:
    return f" × {rule.of} ({scale:g})" if rule.of else ""


def _against_mean(rule: Rule, seen: Observation) -> tuple[float, str] | None:
    """The change as a share of the window's mean; None before the window is full, or at mean 0."""
    if len(seen.window) < rule.window:
        return None
    mean = sum(seen.window) / len(seen.window)
    if mean == 0:
        return None
    words = f"against its mean of the last {rule.window} steps ({mean:.4g})"
    return (seen.value - mean) / abs(mean), words
