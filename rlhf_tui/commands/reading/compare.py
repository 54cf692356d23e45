"""Commands that compare or evaluate finished steps: diff, guardrails."""

from pathlib import Path

import click
import msgspec

from engine.config import file as config_file
from engine.config.rules.supervision import check_rule
from engine.config.sections.supervision import GuardrailConfig
from engine.config.yaml_document import parse_yaml
from engine.errors import UserInputError
from engine.journal.reader import JournalReader
from engine.metrics import DISTINCT_2, KL, RESPONSE_LENGTH, SCORE
from engine.monitoring.recorded_steps import evaluate
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
    """Print the alerts of guard rails on the steps of a session."""
    session = existing(root, name)
    config = _rules(rules) if rules else session.config().guardrails
    with JournalReader(session) as record:
        found = evaluate(record, config, session.config())
        alerts = [alert.as_data() | {"step": alert.step} for alert in found]
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


def _rules(path: Path) -> GuardrailConfig:
    """The guardrails section of a file. Raises UserInputError."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        section = tree.get("guardrails", tree) if isinstance(tree, dict) else tree
        config = msgspec.convert(section, GuardrailConfig)
        for rule in config.rules:
            check_rule(rule)
    except OSError as error:
        raise UserInputError(f"--rules {path}: {error.strerror}") from error
    except (UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UserInputError(f"--rules {path}: {error}") from error
    return config
