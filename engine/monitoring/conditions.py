"""The conditions of guard rails: one function for each key of a rule.

To add one, write a function with the signature of :data:`Condition`, add it to :data:`CONDITIONS`
and declare its key in :class:`engine.config.sections.supervision.Rule`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from msgspec import Struct

from engine.config.sections.supervision import Rule
from engine.metrics import title_of
from engine.monitoring.divergence import Divergence
from engine.monitoring.drift import DriftTest
from engine.monitoring.prediction import STEPS_AHEAD, line_through


class Observation(Struct, frozen=True):
    """A rule's metric at the end of a step."""

    value: float
    """The step's value, finite."""
    scale: float | None
    """Value of the setting that bounds are multiples of; 1 if none is named, None if unset."""
    window: Sequence[float]
    """The values of at most `rule.window` earlier steps, oldest first."""
    drift_up: DriftTest | None = None
    """The test of `rule.drifts_up`, this step included."""
    drift_down: DriftTest | None = None
    """The test of `rule.drifts_down`, this step included."""
    divergence: Divergence | None = None
    """The result of the test of `rule.diverges`."""


@dataclass(frozen=True)
class Breach:
    """A condition that holds."""

    text: str
    """A predicate for the alert: `is 7.26, above 2 × target (3)`."""
    brief: str
    """The same for a status line: `7.26 > 6`."""
    distance: float
    """How far the value is beyond the limit, > 0, in the unit of `limit`; if the condition must
    last, how far the median of those steps is."""
    limit: float
    """The magnitude of the limit; a fraction for changes relative to a mean."""
    since: int | None = None
    """The first step of the evidence; None if it is this step alone."""
    noise: float = 0.0
    """The metric's usual change from one step to the next, in the unit of `limit`; 0 if unknown.
    Distances are measured by it if the limit is near 0."""


Condition = Callable[[Rule, Observation], Breach | None]
"""Returns None if the condition does not hold."""


def above(rule: Rule, observed: Observation) -> Breach | None:
    """The value is above the bound."""
    return _beyond(rule, observed, rule.above, "above", 1)


def below(rule: Rule, observed: Observation) -> Breach | None:
    """The value is below the bound."""
    return _beyond(rule, observed, rule.below, "below", -1)


def predicted_above(rule: Rule, observed: Observation) -> Breach | None:
    """The value is not above the bound, but is predicted to be by a line through the last steps."""
    if rule.predicted_above is None or observed.scale is None:
        return None
    earlier = list(observed.window)[1 - rule.window :]
    value, bound = observed.value, rule.predicted_above * observed.scale
    if len(earlier) < rule.window - 1 or value > bound:
        return None
    predicted = line_through([*earlier, value]).predicted
    if predicted is None or predicted <= bound:
        return None
    unit = f"{rule.predicted_above:g}{_unit(rule, observed.scale)}"
    text = f"is {value:.4g} and rises: {predicted:.4g} in {STEPS_AHEAD} steps is above {unit}"
    brief = f"{value:.4g}, in {STEPS_AHEAD} steps {predicted:.4g} > {bound:.4g}"
    return Breach(text, brief, predicted - bound, abs(bound))


def falls(rule: Rule, observed: Observation) -> Breach | None:
    """The value is below the window's mean by more than a fraction of that mean."""
    return _changed(rule, observed, rule.falls, "fell", -1)


def rises(rule: Rule, observed: Observation) -> Breach | None:
    """The value is above the window's mean by more than a fraction of that mean."""
    return _changed(rule, observed, rule.rises, "rose", 1)


def drifts_up(rule: Rule, observed: Observation) -> Breach | None:
    """The value stays above the median of the run's first steps."""
    return _drifted(rule.window, observed.value, observed.drift_up, "above")


def drifts_down(rule: Rule, observed: Observation) -> Breach | None:
    """The value stays below the median of the run's first steps."""
    return _drifted(rule.window, observed.value, observed.drift_down, "below")


def diverges(rule: Rule, observed: Observation) -> Breach | None:
    """The value rises while the score of another judge falls."""
    found = observed.divergence
    if found is None or rule.diverges is None:
        return None
    change = f"{title_of(found.judge)} falls from {found.highest:.4g} to {found.last:.4g}"
    text = f"rises to {observed.value:.4g} while {change} (since step {found.since})"
    distance = found.excess - rule.diverges
    return Breach(text, f"rises, {change}", distance, rule.diverges, found.since)


CONDITIONS: dict[str, Condition] = {
    "above": above,
    "below": below,
    "predicted_above": predicted_above,
    "falls": falls,
    "rises": rises,
    "drifts_up": drifts_up,
    "drifts_down": drifts_down,
    "diverges": diverges,
}
"""Key of a rule → its condition. The alert shows the first one that holds."""


def not_finite(metrics: Mapping[str, float | None]) -> Breach | None:
    """The condition of a rule for `*`: a metric is infinite or not a number."""
    bad = [k for k, v in metrics.items() if v is not None and not math.isfinite(v)]
    text = f"{', '.join(bad)} not finite"
    return Breach(text, text, 1.0, 1.0) if bad else None


def _beyond(
    rule: Rule, observed: Observation, limit: float | None, where: str, sign: int
) -> Breach | None:
    if limit is None or observed.scale is None:
        return None
    value, bound = observed.value, limit * observed.scale
    values = [*_lasting(rule, observed), value]
    if not all(sign * v > sign * bound for v in values):
        return None
    text = f"is {value:.4g}, {where} {limit:g}{_unit(rule, observed.scale)}"
    text += f" for {rule.lasts} steps" if rule.lasts > 1 else ""
    brief = f"{value:.4g} {'>' if sign > 0 else '<'} {bound:.4g}"
    distance = sign * (median(values) - bound)
    return Breach(text, brief, distance, abs(bound), noise=_noise(observed))


def _lasting(rule: Rule, observed: Observation) -> list[float]:
    """The earlier values for which a bound must also hold; -inf and inf if there are too few."""
    if rule.lasts == 1:
        return []
    earlier = list(observed.window)[1 - rule.lasts :]
    return earlier if len(earlier) == rule.lasts - 1 else [-math.inf, math.inf]


def _noise(observed: Observation) -> float:
    """The median change between two steps of the window, this one included."""
    changes = [abs(b - a) for a, b in pairwise([*observed.window, observed.value])]
    return median(changes) if changes else 0.0


def _changed(
    rule: Rule, observed: Observation, limit: float | None, verb: str, sign: int
) -> Breach | None:
    """The change relative to the window's mean; none before that is full, or if it is 0."""
    if limit is None or len(observed.window) < rule.window:
        return None
    mean = sum(observed.window) / len(observed.window)
    if mean == 0:
        return None
    share = sign * (observed.value - mean) / abs(mean)
    if share <= limit:
        return None
    brief = f"{verb} by {share:.0%} to {observed.value:.4g}"
    text = f"{brief} against its mean of the last {rule.window} steps ({mean:.4g})"
    return Breach(text, brief, share - limit, limit)


def _drifted(window: int, value: float, test: DriftTest | None, where: str) -> Breach | None:
    if test is None or not test.found or not test.baseline:
        return None
    share = (value - test.baseline) / abs(test.baseline)
    brief = f"drifted by {share:+.0%} to {value:.4g}"
    text = (
        f"{brief} since step {test.since}: it stays {where} the median of the first {window} "
        f"steps ({test.baseline:.4g})"
    )
    return Breach(text, brief, test.excess, test.allowed, test.since)


def _unit(rule: Rule, scale: float) -> str:
    return f" × {rule.of} ({scale:g})" if rule.of else ""
