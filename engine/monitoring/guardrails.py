"""Guard rails: rules over metrics that raise alerts, without side effects.

A rule raises an alert when one of its conditions begins to hold. It raises another one each time
the distance by which the metric is beyond the limit has doubled since the last alert, and after no
condition held. Steps without the metric count for neither. The conditions are those of
:mod:`engine.monitoring.conditions`.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.metrics import (
    CLIP_FRACTION,
    DISTINCT_2,
    ENTROPY,
    KL,
    NONFINITE_UPDATES,
    RESPONSE_LENGTH,
    ROLLOUT_GAP_MEAN,
    SCORE_STD,
    title_of,
)
from engine.monitoring.conditions import CONDITIONS, Breach, Observation, not_finite
from engine.protocol.rank_messages import Sample

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(name="non_finite", metric="*", action="pause"),
    Rule(name="non_finite_updates", metric=NONFINITE_UPDATES, above=0.0, action="pause"),
    Rule(name="kl_high", metric=KL, above=2.0, of="target"),
    Rule(name="clip_fraction", metric=CLIP_FRACTION, above=0.5),
    Rule(name="entropy_falls", metric=ENTROPY, falls=0.5),
    Rule(name="repetition", metric=DISTINCT_2, falls=0.4),
    Rule(name="length_bound", metric=RESPONSE_LENGTH, above=0.95, of="max_new_tokens"),
    Rule(name="rollout_gap", metric=ROLLOUT_GAP_MEAN, above=0.1),
    Rule(name="score_std", metric=SCORE_STD, below=1e-3),
)
"""The built-in rules. A configured rule of the same name replaces one."""
EVIDENCE_KEYS = {KL: "kl", RESPONSE_LENGTH: "length"}
"""Metric → the field of a sample that explains it, highest first. Other metrics: lowest score."""
EVIDENCE_SAMPLES = 5
LEAST_DISTANCE = 0.5
"""A metric closer to its limit than this share of the limit counts as that far beyond it. Without
it, one that crosses its limit by a hair would double its distance many times."""


@dataclass(frozen=True)
class Alert:
    """An alert of a rule, with its evidence."""

    rule: str
    action: str
    text: str
    step: int
    evidence: dict[str, Any] = field(default_factory=dict)
    brief: str = ""
    """A shorter text: `KL 7.26 > 6`; empty if `text` is short."""

    @property
    def cause(self) -> str:
        """The alert as the reason of a pause: `kl_high at step 4: KL 7.26 > 6`."""
        return f"{self.rule} at step {self.step}: {self.brief or self.text}"

    def as_data(self) -> dict[str, Any]:
        """The data of the event `alert`."""
        return {"rule": self.rule, "action": self.action, "text": self.text} | self.evidence


class Guardrails:
    """Evaluates a run's rules on each step and keeps the metrics' windows."""

    def __init__(self, config: GuardrailConfig) -> None:
        configured = {r.name: r for r in config.rules}
        defaults = {r.name: r for r in DEFAULT_RULES} if config.defaults else {}
        self.rules = list((defaults | configured).values())
        self._windows: dict[str, deque[tuple[int, float]]] = {
            r.name: deque(maxlen=r.window) for r in self.rules
        }
        """Step and value, oldest first."""
        self._alerted: dict[str, float] = {}
        """Rule whose condition holds → the distance beyond its limit at its last alert."""
        self._without_scale: set[str] = set()
        self._last = 0
        """The last step that was checked."""

    def check(
        self,
        step: int,
        metrics: dict[str, float | None],
        settings: dict[str, Any],
        samples: list[Sample] | None = None,
    ) -> list[Alert]:
        """Evaluates all rules on a finished step.

        Call it once for each step, in order.

        Args:
            step: the step's number.
            metrics: all metrics of the step.
            settings: in force during the step; some bounds are multiples of one.
            samples: the step's responses, from which the evidence is chosen.

        Returns:
            An alert for each rule whose condition begins to hold, or whose metric is twice as far
            beyond its limit as at the last alert.
        """
        alerts = []
        self._last = step
        for rule in self.rules:
            value = metrics.get(rule.metric)
            if value is None and rule.metric != "*":
                continue  # nothing is known at this step, such as between two evaluations
            known = value is not None and math.isfinite(value)
            if known and (text := self._missing_scale(rule, settings)) is not None:
                alerts.append(Alert(rule.name, "notify", text, step))
            breach = self._evaluate(rule, metrics, settings)
            if breach is None:
                self._alerted.pop(rule.name, None)
            elif self._is_due(rule, breach):
                evidence = self._evidence(rule, value, samples or [])
                name = "" if rule.metric == "*" else f"{rule.metric} "
                title = name and f"{title_of(rule.metric)} "
                text, brief = f"{name}{breach.text}", f"{title}{breach.brief}"
                alerts.append(Alert(rule.name, rule.action, text, step, evidence, brief))
            if value is not None and math.isfinite(value):
                self._windows[rule.name].append((step, value))
        return alerts

    def forget_after(self, step: int) -> None:
        """Forgets the steps after `step`, which are abandoned or will be repeated.

        If there were any, conditions that hold after it raise an alert again.
        """
        if self._last <= step:
            return
        self._last = step
        self._alerted.clear()
        for window in self._windows.values():
            while window and window[-1][0] > step:
                window.pop()

    def _window(self, rule: Rule) -> list[float]:
        """The metric's values of at most `rule.window` earlier steps, oldest first."""
        return [value for _, value in self._windows[rule.name]]

    def _evaluate(
        self, rule: Rule, metrics: dict[str, float | None], settings: dict[str, Any]
    ) -> Breach | None:
        """The first condition that holds, or None."""
        if rule.metric == "*":
            return not_finite(metrics)
        value = metrics.get(rule.metric)
        if value is None or not math.isfinite(value):
            return None
        window = self._window(rule)
        observed = Observation(value, _scale(rule, settings), window)
        breaches = (condition(rule, observed) for condition in CONDITIONS.values())
        return next((breach for breach in breaches if breach is not None), None)

    def _is_due(self, rule: Rule, breach: Breach) -> bool:
        """Whether a condition that holds raises an alert; if so, remembers its distance."""
        last = self._alerted.get(rule.name)
        if last is not None and breach.distance < 2 * last:
            return False
        self._alerted[rule.name] = max(breach.distance, LEAST_DISTANCE * breach.limit)
        return True

    def _missing_scale(self, rule: Rule, settings: dict[str, Any]) -> str | None:
        """A message for a bound that has no value; once, and again only after it had one."""
        if _scale(rule, settings) is not None:
            self._without_scale.discard(rule.name)
            return None
        if rule.name in self._without_scale:
            return None
        self._without_scale.add(rule.name)
        state = "unset" if settings.get(rule.of or "") is None else "0"
        return (
            f"rule {rule.name} cannot be evaluated: it is relative to {rule.of}, which is {state}"
        )

    def _evidence(self, rule: Rule, value: float | None, samples: list[Sample]) -> dict[str, Any]:
        return {
            "metric": rule.metric,
            "value": value,
            "window": self._window(rule),
            "samples": [
                {"index": s.index, "prompt": s.prompt, "response": s.response,
                 "score": s.score, "kl": s.kl, "length": s.length}
                for s in worst_samples(rule.metric, samples)
            ],
        }  # fmt: skip


def _scale(rule: Rule, settings: dict[str, Any]) -> float | None:
    """The value that bounds are multiples of; None if that setting is unset or 0."""
    if rule.of is None:
        return 1.0
    value = settings.get(rule.of)
    return float(value) if value else None


def worst_samples(metric: str, samples: list[Sample]) -> list[Sample]:
    """The samples that explain a metric best, at most :data:`EVIDENCE_SAMPLES`."""
    key = EVIDENCE_KEYS.get(metric)
    if key:
        ordered = sorted(samples, key=lambda s: -float(getattr(s, key)))
    else:
        ordered = sorted(samples, key=lambda s: s.score)
    return ordered[:EVIDENCE_SAMPLES]
