"""Guard rails over the steps of a journal: evaluated again, or brought to the state that they had.

The engine checks a step when it ends, this module later. Both come to the same alerts: steps of
abandoned branches do not count, and attempts and other rewards begin where they did.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.config.sections.supervision import GuardrailConfig
from engine.config.settings import settings_of
from engine.journal.reader import JournalReader
from engine.journal.rows import AttemptRow, CommandRow, SampleRow
from engine.metrics import BETA
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import Alert, Guardrails
from engine.protocol.rank_messages import Sample

CHUNK = 1000
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
    """Whether its scores are the first ones of another reward."""


def evaluate(record: JournalReader, rules: GuardrailConfig, run: RunConfig) -> Iterator[Alert]:
    """Yields the alerts that rules raise on a session's steps.

    Raises:
        JournalError: the journal cannot be read.
    """
    rails = Guardrails(rules, judges_of(run))
    samples: dict[int, list[Sample]] = {}
    for row in record.samples.newest():
        samples.setdefault(row.step, []).append(_as_reported(row))
    for step in _steps(record, run, record.metric_names(), record.last_step()):
        _begin(rails, step)
        yield from rails.check(step.step, step.metrics, step.settings, samples.get(step.step))


def rebuild(record: JournalReader, run: RunConfig, last_step: int) -> Guardrails:
    """The guard rails of a run's configuration, for ranks that start after `last_step`.

    What they have raised is what the journal holds, so that a rule that is new or another one
    raises its first alert although its condition has held for long.

    Raises:
        JournalError: the journal cannot be read.
    """
    rails = Guardrails(run.guardrails, judges_of(run))
    raised = record.raised_alerts()
    names = record.metric_names() if rails.metrics is None else rails.metrics
    for step in _steps(record, run, names, last_step):
        _begin(rails, step)
        rails.repeat(step.step, step.metrics, step.settings, raised.get(step.step, ()))
    rails.begin_attempt()
    return rails


def _begin(rails: Guardrails, step: RecordedStep) -> None:
    if step.begins_attempt:
        rails.begin_attempt()
    if step.new_reward:
        rails.forget_steps()


def _steps(
    record: JournalReader, run: RunConfig, names: Collection[str], last_step: int
) -> Iterator[RecordedStep]:
    """The steps from 1 to `last_step`, with these metrics of theirs."""
    names = {*names, BETA}
    commands = [c for c in record.commands() if c.status == "applied" and c.changes]
    settings = _first_settings(run, commands)
    changes: dict[int, dict[str, Any]] = {}
    for command in commands:
        if command.live and command.applied_step is not None:
            values = {change.key: change.new for change in command.changes}
            changes.setdefault(command.applied_step, {}).update(values)
    begins = _first_steps(record.attempts())
    rewards = {step + 1 for step in record.reward_changes()}
    for start in range(0, last_step, CHUNK):
        until = min(start + CHUNK, last_step)
        metrics = _metrics(record, names, start, until)
        for step in range(start + 1, until + 1):
            found = metrics.get(step)
            if found is None:  # the journal was lost, and a new one begins at a checkpoint
                continue
            if BETA not in found:  # rolled back while it was read
                return
            settings |= changes.get(step, {})
            settings |= {"beta": found[BETA]}  # an adaptive controller has no commands
            yield RecordedStep(step, found, settings, step in begins, step in rewards)


def _metrics(
    record: JournalReader, names: Collection[str], after: int, until: int
) -> dict[int, dict[str, float | None]]:
    """Metrics of the steps in (after, until]."""
    metrics: dict[int, dict[str, float | None]] = {}
    for name in names:
        for step, value in record.series(name, after, until):
            # The journal stores a value that is not finite as None.
            metrics.setdefault(step, {})[name] = math.nan if value is None else value
    return metrics


def _first_settings(run: RunConfig, commands: Collection[CommandRow]) -> dict[str, Any]:
    """The settings of the first step: config.yaml holds what a later resume was given.

    `commands` are all that were applied, in order, those of abandoned branches included.
    """
    changes = [change for command in commands for change in command.changes]
    configured = config_file.as_mapping(settings_of(run))
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
        length=row.length, ended=row.ended, parts=row.parts,
    )  # fmt: skip
