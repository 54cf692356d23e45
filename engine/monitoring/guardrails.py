"""Rules over metrics that say "look here": pure, so that they can be replayed over any session.

A rule speaks once when one of its conditions begins to hold, and again only after none does. The
conditions are those of :mod:`engine.monitoring.conditions`.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from engine.config.schema import GuardrailConfig, Rule
from engine.metrics import (
    CLIP_FRACTION,
    DISTINCT_2,
    ENTROPY,
    KL,
    NONFINITE_UPDATES,
    RESPONSE_LENGTH,
    SCORE_STD,
)
from engine.monitoring.conditions import CONDITIONS, Observation, not_finite
from engine.protocol.rank_messages import Sample

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(name="non_finite", metric="*", action="pause"),
    Rule(name="non_finite_updates", metric=NONFINITE_UPDATES, above=0.0, action="pause"),
    Rule(name="kl_high", metric=KL, above=2.0, of="target"),
    Rule(name="clip_fraction", metric=CLIP_FRACTION, above=0.5),
    Rule(name="entropy_falls", metric=ENTROPY, falls=0.5),
    Rule(name="repetition", metric=DISTINCT_2, falls=0.4),
    Rule(name="length_bound", metric=RESPONSE_LENGTH, above=0.95, of="max_new_tokens"),
    Rule(name="score_std", metric=SCORE_STD, below=1e-3),
)
"""Those that come with the software; a rule of the same name takes one's place."""
WORST_BY = {KL: "kl", RESPONSE_LENGTH: "length"}
"""Which number of a sample shows a metric best; otherwise its score, lowest first."""
EVIDENCE_SAMPLES = 5


@dataclass(frozen=True)
class Alert:
    """A rule that speaks, with what made it."""

    rule: str
    action: str
    text: str
    step: int
    evidence: dict[str, Any] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """For the event `alert`."""
        return {"rule": self.rule, "action": self.action, "text": self.text} | self.evidence


class Guardrails:
    """The rules of a run and what they have seen."""

    def __init__(self, config: GuardrailConfig) -> None:
        own = {r.name: r for r in config.rules}
        defaults = {r.name: r for r in DEFAULT_RULES} if config.defaults else {}
        self.rules = list((defaults | own).values())
        self._windows: dict[str, deque[float]] = {
            r.name: deque(maxlen=r.window) for r in self.rules
        }
        self._holding: set[str] = set()
        self._without_scale: set[str] = set()

    def check(
        self,
        step: int,
        metrics: dict[str, float | None],
        settings: dict[str, Any],
        samples: list[Sample] | None = None,
    ) -> list[Alert]:
        """What there is to say about one finished step.

        Args:
            step: its number.
            metrics: all of them.
            settings: in force during it, for the rules that are relative to one.
            samples: its responses, from which those that show it best are chosen.
        """
        alerts = []
        for rule in self.rules:
            value = metrics.get(rule.metric)
            known = value is not None and math.isfinite(value)
            if known and (text := self._missing_scale(rule, settings)) is not None:
                alerts.append(Alert(rule.name, "notify", text, step))
            text = self._evaluate(rule, metrics, settings)
            if text is None:
                self._holding.discard(rule.name)
            elif rule.name not in self._holding:
                self._holding.add(rule.name)
                evidence = self._evidence(rule, value, samples or [])
                alerts.append(Alert(rule.name, rule.action, f"look here: {text}", step, evidence))
            if value is not None and math.isfinite(value):
                self._windows[rule.name].append(value)
        return alerts

    def _evaluate(
        self, rule: Rule, metrics: dict[str, float | None], settings: dict[str, Any]
    ) -> str | None:
        """The sentence, or None where no condition holds."""
        if rule.metric == "*":
            return not_finite(metrics)
        value = metrics.get(rule.metric)
        if value is None or not math.isfinite(value):
            return None
        seen = Observation(value, _scale(rule, settings), self._windows[rule.name])
        said = (condition(rule, seen) for condition in CONDITIONS.values())
        text = next((words for words in said if words is not None), None)
        return None if text is None else f"{rule.metric} {text}"

    def _missing_scale(self, rule: Rule, settings: dict[str, Any]) -> str | None:
        """That a bound has no value; said once, and again only after it had one."""
        if _scale(rule, settings) is not None:
            self._without_scale.discard(rule.name)
            return None
        if rule.name in self._without_scale:
            return None
        self._without_scale.add(rule.name)
        why = "unset" if settings.get(rule.of or "") is None else "0"
        return f"rule {rule.name} cannot be evaluated: {rule.of}, which it is relative to, is {why}"

    def _evidence(self, rule: Rule, value: float | None, samples: list[Sample]) -> dict[str, Any]:
        return {
            "metric": rule.metric,
            "value": value,
            "window": list(self._windows[rule.name]),
            "samples": [
                {"index": s.index, "prompt": s.prompt, "response": s.response,
                 "score": s.score, "kl": s.kl, "length": s.length}
                for s in worst_samples(rule.metric, samples)
            ],
        }  # fmt: skip


def _scale(rule: Rule, settings: dict[str, Any]) -> float | None:
    """What the bounds are multiples of; None where that setting is unset or 0."""
    if rule.of is None:
        return 1.0
    value = settings.get(rule.of)
    return float(value) if value else None


def worst_samples(metric: str, samples: list[Sample]) -> list[Sample]:
    """The five samples that show a metric best."""
    key = WORST_BY.get(metric)
    if key:
        ordered = sorted(samples, key=lambda s: -float(getattr(s, key)))
    else:
        ordered = sorted(samples, key=lambda s: s.score)
    return ordered[:EVIDENCE_SAMPLES]
