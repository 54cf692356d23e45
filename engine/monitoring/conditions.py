"""The conditions of guard rails: one function for each key of a rule.

To add one, write a function with the signature of :data:`Condition`, add it to :data:`CONDITIONS`
and declare its key in :class:`engine.config.sections.supervision.Rule`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config.sections.supervision import Rule


@dataclass(frozen=True)
class Observation:
    """A rule's metric at the end of a step."""

    value: float
    """The step's value, finite."""
    scale: float | None
    """The setting that bounds are multiples of, 1 if the rule names none; None if it is unset."""
    window: Sequence[float]
    """The values of at most `rule.window` earlier steps, oldest first."""


@dataclass(frozen=True)
class Breach:
    """A condition that holds."""

    text: str
    """A predicate for the alert: `is 7.26, above 2 × target (3)`."""
    brief: str
    """The same for a status line: `7.26 > 6`."""
    distance: float
    """How far the value is beyond the limit, > 0, in the unit of `limit`."""
    limit: float
    """The magnitude of the limit; a fraction for changes relative to a mean."""


Condition = Callable[[Rule, Observation], Breach | None]
"""Returns None if the condition does not hold."""


def above(rule: Rule, observed: Observation) -> Breach | None:
    """The value is above the bound."""
    if rule.above is None or observed.scale is None:
        return None
    value, bound = observed.value, rule.above * observed.scale
    if value <= bound:
        return None
    text = f"is {value:.4g}, above {rule.above:g}{_unit(rule, observed.scale)}"
    return Breach(text, f"{value:.4g} > {bound:.4g}", value - bound, abs(bound))


def below(rule: Rule, observed: Observation) -> Breach | None:
    """The value is below the bound."""
    if rule.below is None or observed.scale is None:
        return None
    value, bound = observed.value, rule.below * observed.scale
    if value >= bound:
        return None
    text = f"is {value:.4g}, below {rule.below:g}{_unit(rule, observed.scale)}"
    return Breach(text, f"{value:.4g} < {bound:.4g}", bound - value, abs(bound))


def falls(rule: Rule, observed: Observation) -> Breach | None:
    """The value is below the window's mean by more than a fraction of that mean."""
    if rule.falls is None or (change := _relative_change(rule, observed)) is None:
        return None
    share, mean = change
    if share >= -rule.falls:
        return None
    brief = f"fell by {-share:.0%} to {observed.value:.4g}"
    return Breach(f"{brief} {mean}", brief, -share - rule.falls, rule.falls)


def rises(rule: Rule, observed: Observation) -> Breach | None:
    """The value is above the window's mean by more than a fraction of that mean."""
    if rule.rises is None or (change := _relative_change(rule, observed)) is None:
        return None
    share, mean = change
    if share <= rule.rises:
        return None
    brief = f"rose by {share:.0%} to {observed.value:.4g}"
    return Breach(f"{brief} {mean}", brief, share - rule.rises, rule.rises)


CONDITIONS: dict[str, Condition] = {
    "above": above,
    "below": below,
    "falls": falls,
    "rises": rises,
}
"""Key of a rule → its condition. The alert shows the first one that holds."""


def not_finite(metrics: dict[str, float | None]) -> Breach | None:
    """The condition of a rule for `*`: a metric is infinite or not a number."""
    bad = [k for k, v in metrics.items() if v is not None and not math.isfinite(v)]
    text = f"{', '.join(bad)} not finite"
    return Breach(text, text, 1.0, 1.0) if bad else None


def _unit(rule: Rule, scale: float) -> str:
    return f" × {rule.of} ({scale:g})" if rule.of else ""


def _relative_change(rule: Rule, observed: Observation) -> tuple[float, str] | None:
    """The change relative to the window's mean, and that mean in words.

    None before the window is full, and if the mean is 0.
    """
    if len(observed.window) < rule.window:
        return None
    mean = sum(observed.window) / len(observed.window)
    if mean == 0:
        return None
    text = f"against its mean of the last {rule.window} steps ({mean:.4g})"
    return (observed.value - mean) / abs(mean), text
