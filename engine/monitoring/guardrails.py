"""Guard rails: rules over metrics that raise alerts, without side effects.

A rule raises an alert when one of its conditions begins to hold. It raises another one each time
the distance by which the metric is beyond the limit has doubled since the last alert, and after no
condition held. Steps without the metric count for neither. The conditions are those of
:mod:`engine.monitoring.conditions`.
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.metrics import (
    APPROXIMATE_KL,
    CLIP_FRACTION,
    DISTINCT_2,
    ENTROPY,
    EXPLAINED_VARIANCE,
    KL,
    NONFINITE_UPDATES,
    RESPONSE_LENGTH,
    ROLLOUT_GAP_MEAN,
    SCORE,
    SCORE_STD,
    ZERO_STD,
    title_of,
)
from engine.monitoring.conditions import CONDITIONS, Breach, Observation, not_finite
from engine.monitoring.divergence import DivergenceTest
from engine.monitoring.drift import DriftTest
from engine.protocol.rank_messages import Sample

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(
        name="non_finite", metric="*", action="pause",
        advice="roll back to a checkpoint before it; lower the learning rate",
    ),
    Rule(
        name="non_finite_updates", metric=NONFINITE_UPDATES, above=0.0, action="pause",
        advice="these updates were skipped: lower the learning rate",
    ),
    Rule(
        name="kl_high", metric=KL, above=1.6, of="target",
        advice="read the samples of highest KL; raise beta, or roll back",
    ),
    Rule(
        name="update_kl", metric=APPROXIMATE_KL, above=0.3,
        advice="updates are too large: lower the learning rate or ppo.epochs",
    ),
    Rule(
        name="length_bound", metric=RESPONSE_LENGTH, above=0.95, of="max_new_tokens",
        advice="most responses are cut off: raise max_new_tokens, or penalise truncation",
    ),
    Rule(
        name="rollout_gap", metric=ROLLOUT_GAP_MEAN, above=0.1,
        advice="generation and training disagree: compare their precision and versions",
    ),
    Rule(
        name="score_std", metric=SCORE_STD, below=1e-3,
        advice="all responses score the same: the reward teaches nothing now",
    ),
    Rule(
        name="entropy_drifts", metric=ENTROPY, drifts_down=0.7, window=10,
        advice="the policy commits itself: raise beta or ppo.entropy_coef, lower the learning rate",
    ),
    Rule(
        name="repetition", metric=DISTINCT_2, drifts_down=0.7, window=10,
        advice="responses resemble each other: read some, raise beta, mend what the reward likes",
    ),
    Rule(
        name="length_drifts", metric=RESPONSE_LENGTH, drifts_up=0.5, drifts_down=0.6, window=10,
        advice="read whether the length is earned; otherwise raise beta or penalise length",
    ),
    Rule(
        name="clip_fraction_lasts", metric=CLIP_FRACTION, above=0.25, lasts=5,
        advice="updates are too large: lower the learning rate or ppo.epochs",
    ),
    Rule(
        name="value_head", metric=EXPLAINED_VARIANCE, below=-1.0, lasts=10,
        advice="the value head misleads: raise value_coef or its learning rate, or use rloo",
    ),
    Rule(
        name="value_head_idle", metric=EXPLAINED_VARIANCE, below=0.05, lasts=50, window=50,
        advice="the value head has learnt nothing: raise value_coef or its rate, or use rloo",
    ),
    Rule(
        name="dead_groups", metric=ZERO_STD, above=0.7, lasts=5,
        advice="hardly any prompt teaches: use harder or easier ones, or rollout.dynamic",
    ),
    Rule(
        name="judges_diverge", metric=SCORE, diverges=5.0,
        advice="the reward is being exploited: read the best samples, raise beta or roll back",
    ),
)  # fmt: skip
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
    advice: str = ""
    """What to do, in one line; empty if the rule has none."""

    @property
    def cause(self) -> str:
        """The alert as the reason of a pause: `kl_high at step 4: KL 7.26 > 6`."""
        return f"{self.rule} at step {self.step}: {self.brief or self.text}"

    def as_data(self) -> dict[str, Any]:
        """The data of the event `alert`."""
        data: dict[str, Any] = {"rule": self.rule, "action": self.action, "text": self.text}
        if self.advice:
            data["advice"] = self.advice
        return data | self.evidence


@dataclass
class _Tests:
    """The sequential tests of a rule."""

    up: DriftTest | None
    down: DriftTest | None
    divergence: DivergenceTest | None

    @classmethod
    def of(cls, rule: Rule, judges: Collection[str]) -> "_Tests":
        """Those of a rule's keys."""
        return cls(
            up=DriftTest(1, rule.drifts_up, rule.window) if rule.drifts_up else None,
            down=DriftTest(-1, rule.drifts_down, rule.window) if rule.drifts_down else None,
            divergence=DivergenceTest(rule.diverges, judges) if rule.diverges else None,
        )

    def add(self, step: int, value: float, metrics: dict[str, float | None]) -> None:
        """Takes a step."""
        for drift in (self.up, self.down):
            if drift is not None:
                drift.add(step, value)
        if self.divergence is not None:
            self.divergence.add(step, value, metrics)

    def forget_after(self, step: int) -> None:
        """Forgets the steps after `step`."""
        for drift in (self.up, self.down):
            if drift is not None:
                drift.forget_after(step)
        if self.divergence is not None:
            self.divergence.restart()


class Guardrails:
    """Evaluates a run's rules on each step and keeps the metrics' windows."""

    def __init__(self, config: GuardrailConfig, judges: Collection[str] = ()) -> None:
        """Before the first step.

        Args:
            config: the rules.
            judges: metrics of judges that the run is not trained on, for `diverges`; see
                :func:`engine.monitoring.divergence.judges_of`.
        """
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
        self._tests = {rule.name: _Tests.of(rule, judges) for rule in self.rules}
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
            if known and value is not None:
                self._tests[rule.name].add(step, value, metrics)
            breach = self._evaluate(rule, metrics, settings)
            if breach is None:
                self._alerted.pop(rule.name, None)
            elif self._is_due(rule, breach):
                evidence = self._evidence(rule, value, breach, samples or [])
                name = "" if rule.metric == "*" else f"{rule.metric} "
                title = name and f"{title_of(rule.metric)} "
                text, brief = f"{name}{breach.text}", f"{title}{breach.brief}"
                alerts.append(
                    Alert(rule.name, rule.action, text, step, evidence, brief, rule.advice)
                )
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
        for tests in self._tests.values():
            tests.forget_after(step)

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
        tests = self._tests[rule.name]
        observed = Observation(
            value, _scale(rule, settings), self._window(rule), tests.up, tests.down,
            tests.divergence.found if tests.divergence is not None else None,
        )  # fmt: skip
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

    def _evidence(
        self, rule: Rule, value: float | None, breach: Breach, samples: list[Sample]
    ) -> dict[str, Any]:
        stretch = {} if breach.since is None else {"from_step": breach.since}
        return stretch | {
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
