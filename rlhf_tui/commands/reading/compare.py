"""Commands that compare or evaluate finished steps: diff, guardrails."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from engine.config import file as config_file
from engine.config.key_errors import explain
from engine.config.mistakes import raise_mistakes
from engine.config.rules.supervision import guardrail_mistakes
from engine.config.schema import RunConfig
from engine.config.sections.supervision import GuardrailConfig
from engine.config.yaml_document import parse_yaml
from engine.errors import UserInputError
from engine.examined import examined
from engine.journal.reader import JournalReader
from engine.metrics import DISTINCT_2, EVAL_SCORE, KL, RESPONSE_LENGTH, SCORE
from engine.monitoring.recorded_steps import evaluate
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    existing,
    json_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.commands.shell_complete import complete_name
from rlhf_tui.state.runs.differences import LAST_STEP_SUFFIX, settings_after
from rlhf_tui.text import one_line

HEADLINES = (SCORE, KL, RESPONSE_LENGTH, DISTINCT_2)


@click.command()
@name_argument
@click.argument("others", metavar="OTHER...", nargs=-1, required=True, shell_complete=complete_name)
@sessions_option
@json_option
def diff(root: Path, name: str, others: tuple[str, ...], as_json: bool) -> None:
    """Compare the configurations and metrics of sessions.

    A setting that was changed during a run, by an operator or the controller, is also compared as
    it is after the last step of each session: KEY @ last step.

    Metrics are those of the last step that all of them have; the held-out score that of the last
    step at which all were evaluated.
    """
    names = [name, *others]
    sessions = [existing(root, n) for n in names]
    configs = [session.config() for session in sessions]
    changed = _differences(configs)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(JournalReader(session)) for session in sessions]
        step = min(reader.last_step() for reader in readers)
        metrics = {key: [r.metrics.value_at(key, step) for r in readers] for key in HEADLINES}
        evaluated = [dict(reader.metrics.series(EVAL_SCORE)) for reader in readers]
        settings = [reader.settings_after_last_step() for reader in readers]
    common = max(set[int].intersection(*map(set, evaluated)), default=None)
    held_out = None
    if common is not None:
        held_out = {"step": common, "scores": [scores[common] for scores in evaluated]}
    if as_json:
        found = {"config": changed, "step": step, "metrics": metrics, "held_out": held_out}
        print_json(found | {"settings": settings_after(configs, settings)})
        return
    entries = [_entries(config) for config in configs]
    parts = [
        part
        for key, values in changed.items()
        for part in _parts(key, [of.get(key, v) for of, v in zip(entries, values, strict=True)])
    ]
    rows = [[key, *map(_shown, values)] for key, values in parts]
    after = settings_after(configs, settings)
    rows += [[f"{key}{LAST_STEP_SUFFIX}", *map(_shown, values)] for key, values in after.items()]
    rows += [[f"{k} @ {step}", *map(fmt.number, values)] for k, values in metrics.items()]
    if common is not None:
        rows.append(
            [f"{EVAL_SCORE} @ {common}", *(fmt.number(scores[common]) for scores in evaluated)]
        )
    say(fmt.table(rows, ["", *names]))


def _differences(configs: Sequence[RunConfig]) -> dict[str, list[Any]]:
    """The keys whose values differ, sorted, with the value of each configuration."""
    first, *others = configs
    found = [config_file.changes(first, other) for other in others]
    differences: dict[str, list[Any]] = {}
    for key in sorted(set[str]().union(*found)):
        value = next(changes[key][0] for changes in found if key in changes)
        rest = [changes[key][1] if key in changes else value for changes in found]
        differences[key] = [value, *rest]
    return differences


def _entries(section: msgspec.Struct, prefix: str = "") -> dict[str, list[Any]]:
    """The lists whose entries are sections, such as `reward.mix`, by key."""
    found: dict[str, list[Any]] = {}
    for name, value in msgspec.structs.asdict(section).items():
        if isinstance(value, msgspec.Struct):
            found |= _entries(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(v, msgspec.Struct) for v in value):
            found[prefix + name] = value
    return found


def _parts(key: str, values: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The parts in which the values of a key differ: by list entry and by key of an entry."""
    if all(value == values[0] for value in values):
        return
    if all(isinstance(value, msgspec.Struct) for value in values):
        values = [msgspec.structs.asdict(value) for value in values]
    if all(isinstance(value, dict) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            yield from _parts(f"{key}.{name}", [value.get(name) for value in values])
    elif all(isinstance(value, list) for value in values) and any(
        isinstance(entry, dict | msgspec.Struct) for value in values for entry in value
    ):
        for i, entries in enumerate(itertools.zip_longest(*values)):
            yield from _parts(f"{key}[{i}]", list(entries))
    else:
        yield key, values


def _shown(value: object) -> str:
    """A configuration value as in YAML, on one line; `–` if it is not set."""
    if value is None:
        return "–"
    return one_line(fmt.value_text(_without_defaults(value)))


def _without_defaults(value: object) -> Any:
    """A section as a mapping of the keys whose values are not their defaults."""
    if isinstance(value, list):
        return [_without_defaults(entry) for entry in value]
    if not isinstance(value, msgspec.Struct):
        return value
    given = {}
    for field in msgspec.structs.fields(value):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if (own := getattr(value, field.name)) != default:
            given[field.name] = _without_defaults(own)
    return given


@click.command()
@name_argument
@sessions_option
@click.option(
    "--dry-run",
    is_flag=True,
    expose_value=False,
    help="Evaluate without changing anything; the default.",
)
@click.option(
    "--rules", type=click.Path(path_type=Path), help="A YAML file with a guardrails section."
)
@json_option
def guardrails(root: Path, name: str, rules: Path | None, as_json: bool) -> None:
    """Evaluate guard rails on the steps of a session."""
    session = existing(root, name)
    config = _rules(rules) if rules else session.config().guardrails
    with JournalReader(session) as reader:
        found = evaluate(reader, config, session.config())
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


class _RulesFile(msgspec.Struct):
    guardrails: GuardrailConfig


def _rules(path: Path) -> GuardrailConfig:
    """The guardrails section of a file, or the file as one. Raises UserInputError."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except OSError as error:
        raise UserInputError(f"--rules {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"--rules {path}: {error}") from error
    section = tree
    if isinstance(tree, dict) and not tree.keys() <= set(GuardrailConfig.__struct_fields__):
        if "guardrails" not in tree:
            raise UserInputError(f"--rules {path}: the file has no guardrails section")
        section = tree["guardrails"]
    whole = {"guardrails": section}
    try:
        rules = msgspec.convert(whole, examined(_RulesFile)).guardrails
    except msgspec.ValidationError as error:
        raise UserInputError(f"--rules {path}: {explain(str(error), whole, _RulesFile)}") from None
    raise_mistakes(guardrail_mistakes(rules))
    return rules
