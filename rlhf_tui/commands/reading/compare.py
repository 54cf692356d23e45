"""Commands that compare or evaluate finished steps: diff, guardrails."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from engine.config import file as config_file
from engine.config.rules.supervision import check_rule
from engine.config.schema import RunConfig
from engine.config.sections.supervision import GuardrailConfig
from engine.config.settings import settings_of
from engine.config.yaml_document import parse_yaml
from engine.errors import UserInputError
from engine.journal.json_values import Json
from engine.journal.reader import JournalReader
from engine.journal.rows import SampleRow
from engine.metrics import BETA, DISTINCT_2, KL, LEARNING_RATE, RESPONSE_LENGTH, SCORE
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import Guardrails
from engine.protocol.rank_messages import Sample
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    complete_name,
    existing,
    json_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.text import one_line

HEADLINES = (SCORE, KL, RESPONSE_LENGTH, DISTINCT_2)


@click.command()
@name_argument
@click.argument("other", shell_complete=complete_name)
@sessions_option
@json_option
def diff(root: Path, name: str, other: str, as_json: bool) -> None:
    """Compare the configuration and metrics of two sessions.

    Metrics are those of the last step that both sessions have.
    """
    first, second = existing(root, name), existing(root, other)
    changed = config_file.changes(first.config(), second.config())
    with JournalReader(first) as a, JournalReader(second) as b:
        step = min(a.last_step(), b.last_step())
        metrics = {
            key: tuple(dict(r.series(key, after=step - 1)).get(step) for r in (a, b))
            for key in HEADLINES
        }
    if as_json:
        print_json({"config": changed, "step": step, "metrics": metrics})
        return
    rows = [[k, _shown(old), _shown(new)] for k, (old, new) in changed.items()]
    rows += [[f"{k} @ {step}", *map(fmt.number, values)] for k, values in metrics.items()]
    say(fmt.table(rows, ["", name, other]))


def _shown(value: object) -> str:
    """A configuration value as in YAML, on one line; `–` if it is not set."""
    if value is None:
        return "–"
    return one_line(str(value).lower() if isinstance(value, bool) else str(value))


@click.command()
@name_argument
@sessions_option
@click.option(
    "--dry-run", is_flag=True, expose_value=False, help="The default: evaluate, change nothing."
)
@click.option(
    "--rules", type=click.Path(path_type=Path), help="A YAML file with a guardrails section."
)
@json_option
def guardrails(root: Path, name: str, rules: Path | None, as_json: bool) -> None:
    """Evaluate guard rails on the steps of a session and print their alerts."""
    session = existing(root, name)
    config = _rules(rules) if rules else session.config().guardrails
    with JournalReader(session) as record:
        alerts = list(_alerts(record, config, session.config()))
    if as_json:
        # The round trip turns values that are not finite into null, as in the journal.
        print_json(msgspec.json.decode(msgspec.json.encode(alerts)))
        return
    for alert in alerts:
        advice = f"; {alert['advice']}" if alert.get("advice") else ""
        text = one_line(alert["text"] + advice)
        say(f"step {alert['step']}  {alert['rule']} ({alert['action']}): {text}")
    if not alerts:
        say("no rule raises an alert")


def _alerts(record: JournalReader, config: GuardrailConfig, run: RunConfig) -> Iterator[Json]:
    """Alerts with their steps: every recorded step checked with the settings in force then."""
    rails = Guardrails(config, judges_of(run))
    settings = config_file.as_mapping(settings_of(run))
    changes: dict[int, dict[str, Any]] = {}  # each setting has a type of its own
    for command in record.commands():
        if command.status == "applied" and command.live and command.applied_step is not None:
            for change in command.changes:
                changes.setdefault(command.applied_step, {})[change.key] = change.new
    samples: dict[int, list[Sample]] = {}
    for row in record.samples.newest():
        samples.setdefault(row.step, []).append(_as_reported(row))
    metrics: dict[int, dict[str, float | None]] = {}
    for name in record.metric_names():
        for step, value in record.series(name):
            # The journal stores a value that is not finite as None.
            metrics.setdefault(step, {})[name] = math.nan if value is None else value
    for step, values in sorted(metrics.items()):
        if not step:
            continue  # the evaluation before the first step, which no rule is about
        if BETA not in values:  # a live run recorded this step while its series were read
            break
        settings |= changes.get(step, {})
        settings |= {"beta": values[BETA], "learning_rate": values[LEARNING_RATE]}
        for alert in rails.check(step, values, settings, samples.get(step)):
            yield alert.as_data() | {"step": step}


def _as_reported(row: SampleRow) -> Sample:
    """The sample that the ranks reported; the journal stores values that are not finite as None."""
    return Sample(
        index=row.index, prompt=row.prompt, response=row.response,
        score=math.nan if row.score is None else row.score,
        kl=math.nan if row.kl is None else row.kl,
        length=row.length, ended=row.ended, parts=row.parts,
    )  # fmt: skip


def _rules(path: Path) -> GuardrailConfig:
    """The guardrails section of a file. Raises UserInputError."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        section = tree.get("guardrails", tree) if isinstance(tree, dict) else tree
        config = msgspec.convert(section, GuardrailConfig)
        for rule in config.rules:
            check_rule(rule)
    except (OSError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UserInputError(f"--rules {path}: {error}") from error
    return config
