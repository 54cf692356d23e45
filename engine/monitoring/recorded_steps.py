"""Evaluates guard rails on the steps of a journal, or restores their state from it.

The engine checks a step when it ends, this module later. Both raise the same alerts: steps of
abandoned branches do not count, and starts of attempts and changes of the reward are taken into
account.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.config.schema import RunConfig
from engine.config.sections.supervision import GuardrailConfig
from engine.config.settings import settings_of
from engine.journal.reader import JournalReader
from engine.journal.rows import AttemptRow, CommandRow, SampleRow
from engine.metrics import BETA
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import Alert, Guardrails, sample_evidence
from engine.monitoring.rule_state import RuleState
from engine.protocol.rank_messages import Sample

CHUNK_STEPS = 1000
"""Steps that are read at once: the metrics of a long run would take gigabytes."""


@dataclass(frozen=True)
class RecordedStep:
    """A step of the current timeline."""

    step: int
    metrics: Mapping[str, float | None]
    """NaN is a value that was not finite."""
    settings: Mapping[str, Any]
    """In force during the step."""
    begins_attempt: bool
    """Whether ranks started before it."""
    new_reward: bool
    """Whether its scores are the first from another reward."""


def evaluate(reader: JournalReader, rules: GuardrailConfig, run: RunConfig) -> Iterator[Alert]:
    """Yields the alerts that rules raise on a session's steps.

    Raises:
        JournalError: the journal cannot be read.
    """
    rails = Guardrails(rules, judges_of(run))
    timeline = _Timeline(reader, run)
    for step in timeline.steps(reader.metrics.names(), 0, reader.last_step()):
        if step.begins_attempt:
            rails.begin_attempt()
        if step.new_reward:
            rails.forget_steps()
        for alert in rails.check(step.step, step.metrics, step.settings):
            yield _with_samples(alert, reader)


def _with_samples(alert: Alert, reader: JournalReader) -> Alert:
    """Adds the samples to an alert's evidence; reading those of all steps would take gigabytes."""
    if "samples" not in alert.evidence:
        return alert
    samples = [_as_reported(row) for row in reader.samples.of_step(alert.step)]
    found = {"samples": sample_evidence(alert.evidence["metric"], samples)}
    return replace(alert, evidence=alert.evidence | found)


def rebuild(reader: JournalReader, run: RunConfig, last_step: int) -> Guardrails:
    """The guard rails of a run's configuration, for ranks that start after `last_step`.

    Their past alerts are those in the journal, so a new or changed rule raises its first alert
    even if its condition has held for long.

    A rule's conditions are evaluated only from its last alert until that has cleared: nothing else
    depends on them. From the other steps a rule keeps the last values, and its tests see all of
    them. That takes a second for 100,000 steps, most of it for the tests, and another second for
    each rule whose alert holds all the time.

    Raises:
        JournalError: the journal cannot be read.
    """
    rails = Guardrails(run.guardrails, judges_of(run))
    timeline = _Timeline(reader, run)
    raised = reader.raised_alerts()
    for state in rails.states:
        name = state.rule.name
        alerts = sorted(s for s, rules in raised.items() if name in rules and s <= last_step)
        timeline.restore(state, alerts, last_step)
        if state.began is not None:
            state.began = raised[state.last_alert][name]
    rails.begin_attempt()
    return rails


class _Timeline:
    """The steps of the current timeline, and what was in force during them."""

    def __init__(self, reader: JournalReader, run: RunConfig) -> None:
        self._reader = reader
        commands = [c for c in reader.commands() if c.status == "applied" and c.changes]
        self._first_settings = _first_settings(run, commands)
        self._changes: dict[int, dict[str, Any]] = {}
        for command in commands:
            if command.live and command.applied_step is not None:
                values = {change.key: change.new for change in command.changes}
                self._changes.setdefault(command.applied_step, {}).update(values)
        self._begins = _first_steps(reader.attempts())
        self._rewards = {step + 1 for step in reader.reward_changes()}

    def steps(self, names: Collection[str], after: int, until: int) -> Iterator[RecordedStep]:
        """The steps in (after, until], with the given metrics."""
        names = {*names, BETA}
        settings = dict(self._first_settings)
        for step in sorted(step for step in self._changes if step <= after):
            settings |= self._changes[step]
        for start in range(after, until, CHUNK_STEPS):
            end = min(start + CHUNK_STEPS, until)
            metrics = _metrics(self._reader, names, start, end)
            for step in range(start + 1, end + 1):
                found = metrics.get(step)
                if found is None:  # the journal was lost, and a new one begins at a checkpoint
                    continue
                if BETA not in found:  # rolled back while it was read
                    return
                settings |= self._changes.get(step, {})
                settings |= {"beta": found[BETA]}  # an adaptive controller has no commands
                yield RecordedStep(
                    step, found, settings, step in self._begins, step in self._rewards
                )

    def restore(self, state: RuleState, alerts: list[int], until: int) -> None:
        """Restores a rule's state after a step.

        Args:
            state: the rule's initial state, which is updated.
            alerts: the steps at which the rule raised an alert, in order.
            until: the step.
        """
        forgotten = max((step - 1 for step in self._rewards if step <= until), default=0)
        holding = [a for a in alerts if a > forgotten]
        self._learn(state, forgotten, holding[-1] - 1 if holding else until)
        if holding and not self._observe(state, holding[-1:], until) and holding[:-1]:
            # The rule is another one now, whose condition does not hold on that alert.
            state.forget_steps()
            self._learn(state, forgotten, holding[0] - 1)
            self._observe(state, holding, until)
        state.count, state.last_alert = len(alerts), alerts[-1] if alerts else 0

    def _learn(self, state: RuleState, after: int, until: int) -> None:
        """Adds the steps in (after, until], at which no alert was raised or held."""
        reader, rule = self._reader, state.rule
        if not state.learns_from_all:
            for step, finite in reader.metrics.last_finite(rule.metric, rule.window, after, until):
                state.learn(step, finite, {})
            return
        judges = state.judges if rule.diverges else frozenset()
        for start in range(after, until, CHUNK_STEPS):
            end = min(start + CHUNK_STEPS, until)
            judged = _metrics(reader, judges, start, end)
            for step, value in reader.metrics.series(rule.metric, start, end):
                if value is not None:
                    state.learn(step, value, judged.get(step, {}))

    def _observe(self, state: RuleState, alerts: list[int], until: int) -> bool:
        """Adds the steps from the first of these alerts on.

        Returns:
            Whether the rule's condition holds on one of them.
        """
        rule, held = state.rule, False
        judges = state.judges if rule.diverges else frozenset()
        names = self._reader.metrics.names() if rule.metric == "*" else {rule.metric, *judges}
        for taken in self.steps(names, alerts[0] - 1, until):
            known = state.is_known(taken.metrics)
            breach = state.observe(taken.step, taken.metrics, taken.settings) if known else None
            if taken.step in alerts:
                state.raised(taken.step, breach)
                held = held or breach is not None
            if taken.step >= alerts[-1] and not state.is_raised:
                self._learn(state, taken.step, until)
                break
        return held


def _metrics(
    reader: JournalReader, names: Collection[str], after: int, until: int
) -> dict[int, dict[str, float | None]]:
    """Metrics of the steps in (after, until]."""
    metrics: dict[int, dict[str, float | None]] = {}
    for name in names:
        for step, value in reader.metrics.series(name, after, until):
            # The journal stores a value that is not finite as None.
            metrics.setdefault(step, {})[name] = math.nan if value is None else value
    return metrics


def _first_settings(run: RunConfig, commands: Collection[CommandRow]) -> dict[str, Any]:
    """The settings of the first step: config.yaml holds what a later resume was given.

    `commands` are all that were applied, in order, those of abandoned branches included.
    """
    changes = [change for command in commands for change in command.changes]
    configured = msgspec.structs.asdict(settings_of(run))
    return configured | {change.key: change.old for change in reversed(changes)}


def _first_steps(attempts: list[AttemptRow]) -> set[int]:
    """The first step of each attempt of the current timeline."""
    first: set[int] = set()
    least = math.inf
    for attempt in reversed(attempts):
        if attempt.from_step <= least:  # otherwise a later attempt has abandoned it
            least = attempt.from_step
            first.add(attempt.from_step + 1)
    return first


def _as_reported(row: SampleRow) -> Sample:
    """The sample that the ranks reported; the journal stores values that are not finite as None."""
    return Sample(
        index=row.index, prompt=row.prompt, response=row.response,
        score=math.nan if row.score is None else row.score,
        kl=math.nan if row.kl is None else row.kl,
        length=row.length, ended=row.ended, parts=row.parts, replies=row.replies,
        turn_scores=row.turn_scores,
    )  # fmt: skip
