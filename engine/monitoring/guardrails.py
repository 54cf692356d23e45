"""Rules over metrics that say "look here": pure, so that they can be replayed over any session.

A rule speaks once when its condition begins to hold, and again only after it has ceased to.
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
        self._speaking: set[str] = set()

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
            samples: its answers, from which those that show it best are chosen.
        """
        alerts = []
        for rule in self.rules:
            text = self._judge(rule, metrics, settings)
            if text is None:
                self._speaking.discard(rule.name)
            elif rule.name not in self._speaking:
                self._speaking.add(rule.name)
                evidence = {
                    "metric": rule.metric,
                    "value": metrics.get(rule.metric),
                    "window": list(self._windows[rule.name]),
                    "samples": [
                        {"index": s.index, "prompt": s.prompt, "response": s.response,
                         "score": s.score, "kl": s.kl, "length": s.length}
                        for s in worst_samples(rule.metric, samples or [])
                    ],
                }  # fmt: skip
                alerts.append(Alert(rule.name, rule.action, text, step, evidence))
            value = metrics.get(rule.metric)
            if value is not None and math.isfinite(value):
                self._windows[rule.name].append(value)
        return alerts

    def _judge(
        self, rule: Rule, metrics: dict[str, float | None], settings: dict[str, Any]
    ) -> str | None:
        """The sentence, or None where there is nothing to say."""
        if rule.metric == "*":
            bad = [k for k, v in metrics.items() if v is not None and not math.isfinite(v)]
            return f"look here: {', '.join(bad)} not finite" if bad else None
        value = metrics.get(rule.metric)
        if value is None or not math.isfinite(value):
            return None
        scale = float(settings.get(rule.of) or 1.0) if rule.of else 1.0
        unit = f" × {rule.of} ({scale:g})" if rule.of else ""
        if rule.above is not None and value > rule.above * scale:
            return f"look here: {rule.metric} is {value:.4g}, above {rule.above:g}{unit}"
        if rule.below is not None and value < rule.below * scale:
            return f"look here: {rule.metric} is {value:.4g}, below {rule.below:g}{unit}"
        return self._judge_change(rule, value)

    def _judge_change(self, rule: Rule, value: float) -> str | None:
        window = self._windows[rule.name]
        if len(window) < rule.window:
            return None
        mean = sum(window) / len(window)
        if mean == 0:
            return None
        change = (value - mean) / abs(mean)
        over = f"against its mean of the last {rule.window} steps ({mean:.4g})"
        if rule.falls is not None and change < -rule.falls:
            return f"look here: {rule.metric} fell by {-change:.0%} to {value:.4g} {over}"
        if rule.rises is not None and change > rule.rises:
            return f"look here: {rule.metric} rose by {change:.0%} to {value:.4g} {over}"
        return None


def worst_samples(metric: str, samples: list[Sample]) -> list[Sample]:
    """The five samples that show a metric best."""
    key = WORST_BY.get(metric)
    if key:
        ordered = sorted(samples, key=lambda s: -float(getattr(s, key)))
    else:
        ordered = sorted(samples, key=lambda s: s.score)
    return ordered[:EVIDENCE_SAMPLES]
