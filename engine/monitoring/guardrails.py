"""Guard rails: rules over metrics that raise alerts, without side effects.

A rule raises an alert when one of its conditions begins to hold, and another one each time the
distance by which the metric is beyond the limit has doubled since the last alert. The alert has
cleared when no condition has held for `clears_after` steps in a row; then the rule raises an alert
again. Steps without the metric count for neither. The conditions are those of
:mod:`engine.monitoring.conditions`.
"""

import math
from collections.abc import Collection, Mapping
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
from engine.monitoring.conditions import Breach
from engine.monitoring.rule_state import RuleState
from engine.protocol.rank_messages import Sample

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(
        name="non_finite", metric="*", action="pause",
        advice="roll back to a checkpoint before this step, and lower the learning rate",
    ),
    Rule(
        name="non_finite_updates", metric=NONFINITE_UPDATES, above=0.0, action="pause",
        advice="these updates were skipped: lower the learning rate",
    ),
    Rule(
        name="kl_high", metric=KL, above=2.0, of="target",
        advice="read the samples with the highest KL; raise beta, or roll back",
    ),
    Rule(
        name="kl_climbs", metric=KL, predicted_above=2.2, of="target", window=9,
        advice="raise beta while the KL is low, or lower the learning rate",
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
        advice="all responses score the same, so the policy learns nothing from the reward",
    ),
    Rule(
        name="entropy_drifts", metric=ENTROPY, drifts_down=0.7, window=10,
        advice="the policy explores too little: raise beta or ppo.entropy_coef, or lower the rate",
    ),
    Rule(
        name="repetition", metric=DISTINCT_2, drifts_down=0.7, window=10,
        advice="responses are repetitive: read some; raise beta, or fix what the reward favours",
    ),
    Rule(
        name="length_drifts", metric=RESPONSE_LENGTH, drifts_up=0.5, drifts_down=0.6, window=10,
        advice="read some responses; if the length is unwanted, raise beta or penalise it",
    ),
    Rule(
        name="clip_fraction_lasts", metric=CLIP_FRACTION, above=0.25, lasts=5,
        advice="updates are too large: lower the learning rate or ppo.epochs",
    ),
    Rule(
        name="value_head", metric=EXPLAINED_VARIANCE, below=-1.0, lasts=10,
        advice="the values mislead: resume with a higher ppo.value_coef, or use rloo in a new run",
    ),
    Rule(
        name="value_head_idle", metric=EXPLAINED_VARIANCE, below=0.05, lasts=50, window=50,
        advice="if scores differ: resume with a higher ppo.value_coef, or use rloo in a new run",
    ),
    Rule(
        name="dead_groups", metric=ZERO_STD, above=0.7, lasts=5,
        advice="few prompts are useful: use harder or easier ones, or rollout.dynamic",
    ),
    Rule(
        name="judges_diverge", metric=SCORE, diverges=5.0,
        advice="the reward is being exploited: read the best samples; raise beta or roll back",
    ),
)  # fmt: skip
"""The built-in rules. A configured rule of the same name replaces one."""
EVIDENCE_KEYS = {KL: "kl", RESPONSE_LENGTH: "length"}
"""Metric → the field of a sample that explains it, highest first. Other metrics: lowest score."""
EVIDENCE_SAMPLES = 5


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
    count: int = 0
    """Number of the alert among those of its rule in the run, from 1; 0 if no rule raised it."""
    began: int = 0
    """The step of the first of these alerts since the condition last cleared; 0 if no rule raised
    it."""

    @property
    def cause(self) -> str:
        """The alert as the reason of a pause: `kl_high at step 4: KL 7.26 > 6`."""
        return f"{self.rule} at step {self.step}: {self.brief or self.text}"

    def as_data(self) -> dict[str, Any]:
        """The data of the event `alert`."""
        data: dict[str, Any] = {"rule": self.rule, "action": self.action, "text": self.text}
        if self.brief:
            data["brief"] = self.brief
        if self.advice:
            data["advice"] = self.advice
        if self.count:
            data["count"] = self.count
        if self.began not in (0, self.step):
            data["began"] = self.began
        return data | self.evidence


class Guardrails:
    """Evaluates a run's rules on each step and keeps their state.

    The state follows from the steps of the current timeline and the alerts raised on it, so it is
    not saved: :func:`engine.monitoring.recorded_steps.rebuild` derives it from the journal.
    """

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
        self.states = [RuleState(rule, frozenset(judges)) for rule in self.rules]

    def check(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        settings: Mapping[str, Any],
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
            An alert for each rule whose condition holds. If the rule's last alert has not cleared,
            only if the metric is twice as far beyond its limit as at that alert.
        """
        alerts = []
        for state in self.states:
            rule = state.rule
            if not state.is_known(metrics):
                continue  # nothing is known at this step, such as between two evaluations
            value = metrics.get(rule.metric)
            known = value is not None and math.isfinite(value)
            if known and (text := _missing_scale(state, settings)) is not None:
                alerts.append(Alert(rule.name, "notify", text, step))
            window = state.window
            breach = state.observe(step, metrics, settings)
            if breach is not None and state.is_due(breach):
                stretch = {} if breach.since is None else {"from_step": breach.since}
                evidence = _evidence(rule.metric, value, window, samples or [])
                alerts.append(_alert(state, step, breach, stretch | evidence))
                state.raised(step, breach)
        return alerts

    def first_alerts(self) -> list[int]:
        """For each rule whose alert has not cleared, the step of the first one, in order."""
        return sorted({state.began for state in self.states if state.began is not None})

    def begin_attempt(self) -> None:
        """Call it when ranks start, the first time and at each restart.

        A rule with an action acts again if its condition still holds, because its action may have
        ended with the last ranks or never have begun. A rule that only notifies does not repeat
        its alert.
        """
        for state in self.states:
            state.begin_attempt()

    def forget_steps(self) -> None:
        """Forgets every step; call it when another reward computes the scores from now on."""
        for state in self.states:
            state.forget_steps()


def _missing_scale(state: RuleState, settings: Mapping[str, Any]) -> str | None:
    """A message about a bound without a value; only once until the bound has had a value."""
    lacked, state.lacks_scale = state.lacks_scale, state.scale(settings) is None
    if lacked or not state.lacks_scale:
        return None
    of = state.rule.of or ""
    problem = "unset" if settings.get(of) is None else "0"
    return f"rule {state.rule.name} cannot be evaluated: it is relative to {of}, which is {problem}"


def _alert(state: RuleState, step: int, breach: Breach, evidence: dict[str, Any]) -> Alert:
    """Builds the alert of a rule that is due, before it is counted."""
    rule, count = state.rule, state.count + 1
    of_any = rule.metric == "*"
    text = breach.text if of_any else f"{rule.metric} {breach.text}"
    brief = breach.brief if of_any else f"{title_of(rule.metric)} {breach.brief}"
    if state.is_raised:
        twice = "their median is twice" if rule.lasts > 1 else "twice"
        text += f"; alert {count}, {twice} as far beyond the limit as at step {state.last_alert}"
    elif state.count:
        text += f"; alert {count}, the last one was at step {state.last_alert}"
    began = step if state.began is None else state.began
    return Alert(rule.name, rule.action, text, step, evidence, brief, rule.advice, count, began)


def _evidence(
    metric: str, value: float | None, window: list[float], samples: list[Sample]
) -> dict[str, Any]:
    return {
        "metric": metric,
        "value": value,
        "window": window,
        "samples": sample_evidence(metric, samples),
    }


def sample_evidence(metric: str, samples: list[Sample]) -> list[dict[str, Any]]:
    """The worst samples of a metric, as in the data of an alert."""
    return [
        {"index": s.index, "prompt": s.prompt, "response": s.response,
         "score": s.score, "kl": s.kl, "length": s.length}
        | ({"replies": s.replies} if s.replies else {})
        for s in worst_samples(metric, samples)
    ]  # fmt: skip


def worst_samples(metric: str, samples: list[Sample]) -> list[Sample]:
    """The samples that explain a metric best, at most :data:`EVIDENCE_SAMPLES`."""
    key = EVIDENCE_KEYS.get(metric)
    if key:
        ordered = sorted(samples, key=lambda s: -float(getattr(s, key)))
    else:
        ordered = sorted(samples, key=lambda s: s.score)
    return ordered[:EVIDENCE_SAMPLES]
