"""The command that trains a reward model on judgements: reward train."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import click
import msgspec

from engine.config.model_folder import is_model
from engine.config.reward_training import parse_settings
from engine.config.rules.reward import SOURCE_OPTIONS
from engine.config.schema import RunConfig
from engine.config.sections.reward import SOURCE_KEYS, RewardConfig
from engine.errors import UserInputError
from engine.examined import examined
from engine.journal.judgements.training_data import collect_judgements
from engine.launch.start_checkpoints import last_checkpoint
from engine.protocol.programs.reward_training import (
    HeldOutAgreement,
    RewardTrainingRequest,
    TrainedReward,
    TrainingProgress,
)
from engine.session.folder import SessionFolder, free_name
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    existing,
    json_option,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.commands.shell_complete import complete_name
from rlhf_tui.engine_program import run_engine_program
from rlhf_tui.output_file import is_free
from rlhf_tui.text import one_line

OTHER_SOURCES = {key for key in SOURCE_KEYS if key != "model"}
"""Keys of `reward` that name another source than a reward model."""
OTHER_OPTIONS = {key for key, kinds in SOURCE_OPTIONS.items() if "model" not in kinds}
"""Keys of `reward` that are refused for a reward model."""


@click.command()
@click.argument(
    "names", metavar="SESSION...", nargs=-1, required=True, shell_complete=complete_name
)
@sessions_option
@click.option(
    "--base", metavar="MODEL",
    help="The model to start from: a classifier, or a language model, which gets a new head. "
    "Default: the session's reward model.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="The folder to write, usable as reward.model.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="A training setting, such as learning_rate=1e-5 (docs/reward-training.md).",
)  # fmt: skip
@json_option
def train(
    root: Path,
    names: tuple[str, ...],
    base: str | None,
    out: Path,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a reward model on the labels and preferences of sessions."""
    sessions = [existing(root, name) for name in dict.fromkeys(names)]
    for session in sessions:
        session.check_owner()
    chosen = parse_settings(settings)
    target = _new_folder(out)
    configs = [session.config() for session in sessions]
    if base is None:
        _check_common_model(sessions, configs)
    found = collect_judgements(sessions)
    request = RewardTrainingRequest(
        sessions=[session.name for session in sessions],
        configs=configs,
        responses=found.responses,
        preferences=found.preferences,
        labels=found.labels,
        newest=found.newest,
        base=_anchored(base),
        out=str(target),
        command=shlex.join(["rlhf-tui", *sys.argv[1:]]),
        settings=chosen,
    )

    def show(line: bytes) -> None:
        if line.startswith(b'{"type":"progress"'):
            text = msgspec.json.decode(line, type=examined(TrainingProgress)).text
            click.echo(one_line(text), err=True)

    result = run_engine_program(
        TrainedReward, "engine.train.reward_training",
        given=request, launch=configs[0].launch, failed="the training failed", on_line=show,
    )  # fmt: skip
    if as_json:
        print_json(msgspec.to_builtins(result))
        return
    for line in report(result):
        say(line)
    if result.warning:
        say(("doubtful     ", "warn"), result.warning)
    say(f"next         {fork_command(sessions[0], configs[0].reward, result)}")


def _new_folder(out: Path) -> Path:
    """The absolute path of a folder to be written. Raises UserInputError."""
    target = Path(os.path.abspath(out))  # noqa: PTH100 - a link stays what it is
    if not is_free(target):
        raise UserInputError(f"-o: {out} exists already; give a new or empty folder")
    if not (nearest := next(path for path in target.parents if path.exists())).is_dir():
        raise UserInputError(f"-o: {nearest} is not a folder")
    return target


def _anchored(base: str | None) -> str | None:
    """A model folder as an absolute path; anything else is an id on the hub."""
    if base is None or not is_model(Path(base).expanduser()):
        return base
    return str(Path(base).expanduser().resolve())


def _check_common_model(sessions: list[SessionFolder], configs: list[RunConfig]) -> None:
    """Checks that the sessions have one reward model, to start from. Raises UserInputError."""
    for session, config in zip(sessions, configs, strict=True):
        models = config.reward.models()
        if len(models) != 1:
            count = "no reward model" if not models else f"{len(models)} reward models"
            raise UserInputError(
                f"session '{session.name}' has {count} ({config.reward.scored_by}): choose the "
                f"model to start from with --base, such as its policy, {config.model.policy}"
            )
        if models[0].model != configs[0].reward.models()[0].model:
            raise UserInputError(
                f"sessions '{sessions[0].name}' and '{session.name}' have different reward models: "
                "choose the one to start from with --base"
            )


def report(result: TrainedReward) -> list[str]:
    """The lines that describe a trained model."""
    calibration, new = result.calibration, result.new_scale
    lines = [f"note         {one_line(note)}" for note in result.notes]
    lines += [
        f"judgements   {fmt.plural(result.preferences, 'preference')}, {result.good} labels good, "
        f"{result.other} bad or hack; {result.held_out} held out, by {result.split_by}",
        f"kept         epoch {result.best_epoch} of {result.epochs}",
        f"held out     this model agrees with {_agreement(result.trained)}",
    ]
    if result.in_force is not None:
        lines.append(f"             the reward in force with {_agreement(result.in_force)}")
    if result.at_start is not None:
        base = one_line(result.base)
        lines.append(f"             {base} before training with {_agreement(result.at_start)}")
    lines += [
        f"calibration  it states {calibration.stated:.0%} on average and is right in "
        f"{calibration.right:.0%} of {fmt.plural(calibration.comparisons, 'comparison')}; log loss "
        f"{calibration.log_loss:.3f} nats (a coin 0.693)",
        f"scale        scores of the newest responses: {fmt.number(new.mean)} ± "
        f"{fmt.number(new.std)}",
    ]
    if (old := result.old_scale) is not None and result.width is not None:
        advice = (
            "about as wide as before: kl.beta can stay"
            if result.keeps_width
            else f"{result.width:.2g} times as wide: multiply kl.beta by {result.width:.2g}, or "
            "set reward.normalise=reference, to keep the balance with the KL"
        )
        recorded = f"{fmt.number(old.mean)} ± {fmt.number(old.std)}"
        lines.append(f"             recorded: {recorded}. The scores are {advice}")
    return [*lines, f"written      {one_line(result.out)}"]


def _agreement(found: HeldOutAgreement) -> str:
    return (
        f"{found.agreement:.0%} of {fmt.plural(found.judgements, 'judgement')} "
        f"({found.low:.0%} to {found.high:.0%})"
    )


def fork_command(session: SessionFolder, reward: RewardConfig, result: TrainedReward) -> str:
    """The command that continues a session with the trained model."""
    keys: dict[str, object] = {"model": result.out}
    if result.label is not None and result.base != reward.model:
        keys["label"] = result.label
    if result.pair:
        keys["pair"] = True
    if reward.mix:
        options = [f"reward.mix={_yaml([keys])}"]
    else:
        # What the session's reward has, and this model has not.
        unset = ({"revision", "pair"} | OTHER_SOURCES | OTHER_OPTIONS) - keys.keys()
        unset |= {"label"} if result.label is None else set()
        defaults = RewardConfig()
        for key in sorted(unset):
            default = getattr(defaults, key)
            if getattr(reward, key) != default:
                keys[key] = {} if isinstance(default, msgspec.Struct) else default
        options = [f"reward.{key}={_yaml(value)}" for key, value in keys.items()]
    step = last_checkpoint(session)
    if step >= session.config().train.steps:
        options.append(f"train.steps={2 * step}")
    words = ["--from", str(step) if step else "STEP"]
    words += ["--name", free_name(session.folder.parent, session.name)]
    words += [word for option in options for word in ("-o", option)]
    return one_line(session.command("fork", *words))


def _yaml(value: object) -> str:
    """A value as `-o` reads it: JSON, or a text as it is where YAML leaves it alone."""
    if isinstance(value, str) and not re.search(r": | #|:$", value):
        return value
    return json.dumps(value, ensure_ascii=False)
