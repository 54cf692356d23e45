"""The state of one guard rail: its recent values, and when it is due to raise an alert."""

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.sections.supervision import Rule
from engine.monitoring.conditions import CONDITIONS, Breach, Observation, not_finite
from engine.monitoring.divergence import DivergenceTest
from engine.monitoring.drift import DriftTest

CLEARS_AFTER = 20
"""Default of `clears_after` for a rule that only notifies."""
MIN_DISTANCE = 0.5
"""Minimum distance beyond the limit, as a share of the limit; the usual change from step to step is
another minimum. Otherwise a metric just across its limit would double its distance many times."""


def clears_after(rule: Rule) -> int:
    """The number of steps in a row without a rule's condition after which its alert clears."""
    if rule.clears_after is not None:
        return rule.clears_after
    return CLEARS_AFTER if rule.action == "notify" else 1


@dataclass
class _Tests:
    """The sequential tests of a rule."""

    up: DriftTest | None
    down: DriftTest | None
    divergence: DivergenceTest | None

    @classmethod
    def of(cls, rule: Rule, judges: Collection[str]) -> "_Tests":
        """Creates the tests for a rule's keys."""
        return cls(
            up=DriftTest(1, rule.drifts_up, rule.window) if rule.drifts_up else None,
            down=DriftTest(-1, rule.drifts_down, rule.window) if rule.drifts_down else None,
            divergence=DivergenceTest(rule.diverges, judges) if rule.diverges else None,
        )

    def add(self, step: int, value: float, metrics: Mapping[str, float | None]) -> None:
        """Adds a step."""
        for drift in (self.up, self.down):
            if drift is not None:
                drift.add(step, value)
        if self.divergence is not None:
            self.divergence.add(step, value, metrics)


class RuleState:
    """A rule, the values of its metric and the alerts that it has raised."""

    def __init__(self, rule: Rule, judges: Collection[str]) -> None:
        """Before the first step. `judges`: metrics, for `diverges`."""
        self.rule = rule
        self.count = 0
        """The alerts that it has raised in this run."""
        self.last_alert = 0
        """The step of the last one."""
        self.lacks_scale = False
        """Whether the last step had no value for the setting that bounds are multiples of."""
        self.judges = judges
        """Metrics that `diverges` needs."""
        self._clears_after = clears_after(rule)
        self._conditions = [
            condition for key, condition in CONDITIONS.items() if getattr(rule, key) is not None
        ]
        self.forget_steps()

    def forget_steps(self) -> None:
        """Forgets every step, but not the alerts."""
        self._tests = _Tests.of(self.rule, self.judges)
        self._values: deque[float] = deque(maxlen=self.rule.window)
        self._alerted: float | None = None
        """How far the metric was beyond its limit at the last alert; None if that has cleared."""
        self.began: int | None = None
        """The step of the first alert since the last one that has cleared; None without alerts. It
        stays if ranks start, unlike what makes the next alert due."""
        self._steps_without = 0
        """Steps in a row on which no condition held."""

    @property
    def window(self) -> list[float]:
        """The metric's values of at most `rule.window` steps, oldest first."""
        return list(self._values)

    def is_known(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether a step has the rule's metric, such as that of an evaluation."""
        return self.rule.metric == "*" or metrics.get(self.rule.metric) is not None

    def observe(
        self, step: int, metrics: Mapping[str, float | None], settings: Mapping[str, Any]
    ) -> Breach | None:
        """Adds a step; returns the first condition that holds, or None.

        A value that is not finite counts as missing: it neither meets nor clears a condition.
        """
        value = metrics.get(self.rule.metric)
        if self.rule.metric == "*":
            breach = not_finite(metrics)
        elif value is not None and math.isfinite(value):
            self._tests.add(step, value, metrics)
            breach = self._evaluate(value, settings)
            self._values.append(value)
        else:
            return None
        self._steps_without = 0 if breach is not None else self._steps_without + 1
        if self._steps_without >= self._clears_after:
            self._alerted = self.began = None
        return breach

    def learn(self, step: int, value: float, metrics: Mapping[str, float | None]) -> None:
        """Adds a step with a finite value at which no alert was raised or held.

        Whether a condition held at the step then makes no difference.
        """
        self._tests.add(step, value, metrics)
        self._values.append(value)

    @property
    def learns_from_all(self) -> bool:
        """Whether the state depends on all steps, and not only on the last `rule.window`."""
        tests = self._tests
        return any(test is not None for test in (tests.up, tests.down, tests.divergence))

    def is_due(self, breach: Breach) -> bool:
        """Whether a condition that holds raises an alert."""
        return self._alerted is None or breach.distance >= 2 * self._alerted

    @property
    def is_raised(self) -> bool:
        """Whether there is an alert that has not cleared."""
        return self._alerted is not None

    def raised(self, step: int, breach: Breach | None) -> None:
        """Counts an alert; the next one is due when the distance of `breach` has doubled."""
        self.count += 1
        self.last_alert = step
        if breach is not None:
            self.began = step if self.began is None else self.began
            self._alerted = max(breach.distance, MIN_DISTANCE * breach.limit, breach.noise)

    def begin_attempt(self) -> None:
        """Clears the alert of a rule with an action, which has to act on the ranks that start."""
        self.lacks_scale = False
        if self.rule.action != "notify":
            self._alerted = None

    def scale(self, settings: Mapping[str, Any]) -> float | None:
        """The value that bounds are multiples of; None if that setting is unset or 0."""
        if self.rule.of is None:
            return 1.0
        value = settings.get(self.rule.of)
        return float(value) if value else None

    def _evaluate(self, value: float, settings: Mapping[str, Any]) -> Breach | None:
        tests = self._tests
        observed = Observation(
            value, self.scale(settings), self.window, tests.up, tests.down,
            tests.divergence.found if tests.divergence is not None else None,
        )  # fmt: skip
        for condition in self._conditions:
            if (breach := condition(self.rule, observed)) is not None:
                return breach
        return None
