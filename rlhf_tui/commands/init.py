"""The command that writes a first configuration: init."""

import csv
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from engine.config import file as config_file
from engine.config.recipes import MICRO_BATCH, RECIPES, for_real_models
from engine.config.sections.reward import SOURCE_KEYS
from engine.config.yaml_comments import commented
from engine.errors import ConfigError, UserInputError
from engine.launch.environment import torch_is_built_for_gpus
from engine.launch.inputs import check_inputs
from engine.monitoring.telemetry import gpu_count
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import is_terminal, override_option, say
from rlhf_tui.output_file import check_output, write_output
from rlhf_tui.text import one_line

STARTER_VALUES = {
    "policy": "starter:policy", "prompts": "starter:prompts", "reward_model": "starter:reward",
}  # fmt: skip
"""The values that are used if none are given."""
DEFAULT_COLUMN = "prompt"
"""The column that is used if none is given."""
OTHER_PROMPT_COLUMNS = ({"chosen", "rejected"}, {"messages"})
"""Columns from which a prompt is taken if there is no such column; see docs/data.md."""
REWARD_KEYS = tuple(f"reward.{key}=" for key in (*SOURCE_KEYS, "mix"))
"""Beginnings of overrides with the origin of a score."""
FUNCTION = re.compile(r"(?!starter:)[\w.]+:\w+")
"""A reward that is a Python function."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("run.yaml"))
@click.option(
    "--recipe", type=click.Choice(list(RECIPES)), default="ppo", show_default=True,
    help="How to train; the files in examples/ have the details.",
)  # fmt: skip
@click.option("--policy", metavar="MODEL", help="The model to train: a folder or a hub id.")
@click.option(
    "--prompts", metavar="DATA", help="A .jsonl, .csv or .parquet file, a folder, or a hub id."
)
@click.option("--column", metavar="NAME", help="The column with the prompts.  [default: prompt]")
@click.option("--reward-model", metavar="MODEL", help="A sequence classifier: a folder or hub id.")
@click.option("--reward-function", metavar="MODULE:NAME", help="A Python function that scores.")
@click.option("--force", is_flag=True, help="Replace the file.")
@override_option
def init(
    file: Path, recipe: str, policy: str | None, prompts: str | None, column: str | None,
    reward_model: str | None, reward_function: str | None, force: bool, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Write a commented configuration to start from.

    Asks for what you do not give. Without a terminal, uses the starter's models and prompts.
    """
    check_output(file)
    if file.exists() and not force:
        raise UserInputError(f"{file} exists: give another name, or --force to replace it")
    if reward_model is not None and reward_function is not None:
        raise UserInputError("give one of --reward-model and --reward-function")
    given = {"policy": policy, "prompts": prompts}
    rest = {"column": column, "reward-model": reward_model, "reward-function": reward_function}
    for option, value in (given | rest).items():
        if value is not None and not value.strip():
            raise UserInputError(f"--{option} is empty; give a value, or leave it out")
    if reward_function is None and not _name_a_reward(overrides):
        given["reward_model"] = reward_model
    answers = ask_missing(given, overrides)
    if not any(word.startswith("data.") for word in overrides):
        column = prompt_column(answers["prompts"], column)
    tree = configuration(recipe, answers, column, reward_function)
    tree = _with_paths_from_file(tree, file)
    config_file.apply_overrides(tree, overrides)
    head = (
        f"# {RECIPES[recipe].title}.\n"
        f"# Try it: rlhf-tui check {file}. Start it: rlhf-tui run {file}.\n"
        "# Other keys have their defaults: docs/configuration.md.\n"
    )
    text = head + commented(tree) + "\n"
    write(file, text)
    say(f"wrote {file}; try it with: {fmt.command('check', str(file))}")
    if answers["policy"] != STARTER_VALUES["policy"] and "dtype" not in tree["model"]:
        say(
            "it is for a CPU, because no GPU was found; for a GPU, add to init or run: "
            f"-o model.dtype=bfloat16 -o ppo.micro_batch_size={MICRO_BATCH['gpu']}"
        )


def ask_missing(given: dict[str, str | None], overrides: tuple[str, ...]) -> dict[str, str]:
    """Asks for the values that are not given; without a terminal, takes the starter's."""
    titles = {
        "policy": "The model to train (a folder or a hub id)",
        "prompts": "The prompts (a file, a folder or a hub id)",
        "reward_model": "The reward (a model's folder or hub id, or module:function)",
    }
    asking = is_terminal() and not all(given.values())
    answers = {}
    for name, value in given.items():
        default = STARTER_VALUES[name]
        if value is None and asking:
            check = partial(checked_answer, name, overrides)
            value = click.prompt(titles[name], default=default, err=True, value_proc=check)
        answers[name] = default if value is None else value
    return answers


def _name_a_reward(overrides: tuple[str, ...]) -> bool:
    """Whether overrides say where the scores come from."""
    return any(word.startswith(REWARD_KEYS) for word in overrides)


def checked_answer(name: str, overrides: tuple[str, ...], answer: str) -> str:
    """Returns the answer. Raises UsageError, upon which click asks again, if it cannot be used."""
    answer = answer.strip() or STARTER_VALUES[name]
    answers = STARTER_VALUES | {name: answer}
    if _name_a_reward(overrides):
        del answers["reward_model"]
    tree = configuration("ppo", answers, None, None)
    try:
        check_inputs(config_file.from_mapping(tree, Path.cwd(), overrides))
    except ConfigError as error:
        raise click.UsageError(one_line(str(error))) from error
    return answer


def prompt_column(prompts: str, given: str | None) -> str | None:
    """The column to configure: the given one, or one that is asked for; None for `prompt`.

    Raises:
        UserInputError: the file has no such column, and nobody can be asked.
    """
    columns = columns_of(Path(prompts).expanduser())
    wanted = given or DEFAULT_COLUMN
    if not columns or wanted in columns:
        return given
    if given is None and any(names <= set(columns) for names in OTHER_PROMPT_COLUMNS):
        return None
    listed = ", ".join(map(one_line, columns))
    if given is not None or not is_terminal():
        raise UserInputError(f"{prompts} has no column '{wanted}': give --column one of {listed}")
    asked_for = f"The column with the prompts ({listed})"
    chosen: str = click.prompt(asked_for, type=click.Choice(columns), show_choices=False, err=True)
    return chosen


def columns_of(file: Path) -> list[str]:
    """The columns of the first row of a JSONL or CSV file; empty if they are not known."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                return next(csv.reader(lines), [])
            row = json.loads(lines.readline()) if file.suffix == ".jsonl" else None
    except (OSError, ValueError, csv.Error):  # what is wrong with it, check says
        return []
    return list(row) if isinstance(row, dict) else []


def configuration(
    recipe: str, answers: dict[str, str], column: str | None, function: str | None
) -> dict[str, dict[str, Any]]:
    """The sections of the configuration as YAML has them, those that everybody changes first."""
    settings = RECIPES[recipe].settings()
    if answers["policy"] != STARTER_VALUES["policy"]:
        gpu = torch_is_built_for_gpus() and gpu_count() > 0
        settings = for_real_models(settings, gpu=gpu)
    data = {"prompts": answers["prompts"]} | ({"column": column} if column else {})
    model = answers.get("reward_model")
    if model is not None and FUNCTION.fullmatch(model):
        function, model = model, None
    source = {"function": function, "model": None if function else model}
    tree = {
        "model": {"policy": answers["policy"]} | settings.get("model", {}),
        "data": data,
        "reward": {k: v for k, v in source.items() if v} | settings.get("reward", {}),
    }
    return tree | {k: dict(v) for k, v in settings.items() if k not in tree}


def _with_paths_from_file(tree: dict[str, dict[str, Any]], file: Path) -> dict[str, dict[str, Any]]:
    """Rebases paths from the current folder, where they are typed, to the file's folder."""
    folder = file.absolute().parent
    for section, key in (("model", "policy"), ("data", "prompts"), ("reward", "model")):
        value = tree[section].get(key)
        if isinstance(value, str) and not value.startswith(("/", "~")) and Path(value).exists():
            relative = os.path.relpath(Path(value).absolute(), folder)
            tree[section][key] = relative if "/" in relative else f"./{relative}"
    return tree


def write(file: Path, text: str) -> None:
    """Writes the file if it is a configuration that can be used.

    Raises:
        UserInputError: it is not, or it cannot be written.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            check_inputs(config_file.load(draft))
        finally:
            draft.unlink(missing_ok=True)
        write_output(file, text.encode())
    except OSError as error:
        raise UserInputError(f"cannot write {file}: {error.strerror}") from error
