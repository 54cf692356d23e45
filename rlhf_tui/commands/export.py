"""The command that exports parts of a session: its policy, samples or preferences."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec

from engine.errors import DamagedCheckpointError, RlhfError, SessionError, UserInputError
from engine.journal.json_values import Json
from engine.journal.judgements.preference_pairs import preference_pairs
from engine.journal.samples import SampleReader, with_judgements
from engine.launch.environment import clean_environment
from engine.launch.start_checkpoints import check_average, check_step, checkpoint_steps
from engine.session.access import open_to_umask
from engine.session.checkpoints import (
    AVERAGED_POLICY,
    BASE_ADAPTERS,
    POLICY,
    checkpoint_path,
    find_damage,
)
from engine.session.folder import SessionFolder
from engine.session.temporary_folders import written_whole
from rlhf_tui import format as fmt
from rlhf_tui.commands.checkpoint_step import StepChoice, checkpoint_step, step_choice
from rlhf_tui.commands.options import existing, name_argument, say, sessions_option
from rlhf_tui.commands.shell_complete import complete_step
from rlhf_tui.output_file import is_free, write_output
from rlhf_tui.report.model_card import CARD, ExportedPolicy, model_card


@click.command()
@name_argument
@sessions_option
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Copy the policy as a model folder.",
)
@click.option("--merged", is_flag=True, help="With --policy: merge LoRA adapters into the model.")
@click.option(
    "--ema", "averaged", is_flag=True, help="With --policy: the averaged policy of train.ema."
)
@click.option(
    "--samples", type=click.Path(path_type=Path), metavar="FILE", help="Write samples as JSONL."
)
@click.option(
    "--preferences",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write judged pairs of responses, chosen and rejected, as JSONL.",
)
@click.option(
    "--step", "choice", type=step_choice, shell_complete=complete_step, metavar="STEP",
    help="With --policy: the checkpoint, or last or best.  [default: last]",
)  # fmt: skip
@click.option("--best", is_flag=True, help="With --policy: like --step best, by train.best_metric.")
def export(
    root: Path,
    name: str,
    policy: Path | None,
    merged: bool,
    averaged: bool,
    samples: Path | None,
    preferences: Path | None,
    choice: StepChoice | None,
    best: bool,
) -> None:
    """Export the policy, samples or preferences of a session."""
    session = existing(root, name)
    if policy is None and (merged or averaged or best or choice):
        raise UserInputError("--step, --merged, --ema and --best need --policy DIR")
    if policy is None and samples is None and preferences is None:
        raise UserInputError("export needs --policy DIR, --samples FILE or --preferences FILE")
    if best and choice:
        raise UserInputError("give --step or --best, not both")
    if policy is not None:
        step = checkpoint_step(session, "best" if best else choice or "last")
        check_step(session, step, checkpoint_steps(session))
        say(_export_policy(session, step, policy, averaged=averaged, merged=merged))
    if samples is not None:
        say(_export_samples(session, samples))
    if preferences is not None:
        say(_export_preferences(session, preferences))


def _export_samples(session: SessionFolder, target: Path) -> str:
    """Writes all samples with their judgements. Returns a line that describes the file."""
    with SampleReader(session) as reader:
        rows = with_judgements(session, reader.iter_newest())
        count = _write_lines(target, (row.as_json() for row in rows))
    return f"wrote {fmt.plural(count, 'sample')} to {target}"


def _export_preferences(session: SessionFolder, target: Path) -> str:
    """Writes the judged pairs of responses. Returns a line that describes the file."""
    found = preference_pairs(session)
    _write_lines(target, (msgspec.structs.asdict(pair) for pair in found.pairs))
    left_out = f"; {found.left_out} left out, whose messages are not recorded"
    line = f"wrote {fmt.plural(len(found.pairs), 'pair')} to {target}"
    return line + (left_out if found.left_out else "")


def _export_policy(
    session: SessionFolder, step: int, target: Path, *, averaged: bool, merged: bool
) -> str:
    """Writes a model folder of a checkpoint. Returns a line that describes it."""
    if not is_free(target):
        raise UserInputError(f"--policy: {target} exists already; give a new or empty folder")
    part, what = (AVERAGED_POLICY, "averaged policy") if averaged else (POLICY, "policy")
    source = checkpoint_path(session.checkpoints, step) / part
    if averaged:
        check_average(session, step)
    config = session.config()
    adapted = config.lora.rank is not None
    # Without it, they would be adapters for adapters, which peft would not load together.
    with_base = (source / BASE_ADAPTERS).is_file()
    merged = merged or with_base
    damage: str | None = None  # which a merge finds itself
    try:
        with written_whole(Path(os.path.realpath(target))) as folder:
            if adapted and merged:
                session.check_owner()
                _merge(session, step, part, folder, target)
            else:
                _copy(source, folder)
                damage = find_damage(source.parent, part, folder)
            # A deletion that began meanwhile has already removed the marker.
            check_step(session, step, checkpoint_steps(session))
            if damage:
                raise DamagedCheckpointError(
                    f"the checkpoint of step {step} is damaged: {damage}; nothing was exported, "
                    "choose another one with --step"
                )
            exported = ExportedPolicy(step, averaged=averaged, adapters=adapted and not merged)
            no_card = _write_card(session, exported, folder)
            open_to_umask(folder)
    except OSError as error:
        check_step(session, step, checkpoint_steps(session))  # not deleted meanwhile
        reason = error.strerror or error
        raise UserInputError(f"--policy: cannot write {target}: {reason}") from error
    if adapted and merged:
        both = f", with those in {config.model.policy}" if with_base else ""
        return f"the {what} of step {step} is in {target}, adapters merged{both}{no_card}"
    if adapted:
        which = "averaged adapters" if averaged else "adapters"
        base = config.model.policy
        return f"the {which} of step {step} are in {target}; base model: {base}{no_card}"
    note = "; all weights were trained, so there is nothing to merge" if merged else ""
    return f"the {what} of step {step} is in {target}{note}{no_card}"


def _copy(source: Path, folder: Path) -> None:
    """Copies what is in a folder. Unlike `shutil.copytree`, it ends with the first error."""
    for path in sorted(source.rglob("*")):
        copy = folder / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            shutil.copy2(path, copy)


def _write_card(session: SessionFolder, policy: ExportedPolicy, folder: Path) -> str:
    """Writes the card. Returns why it could not: weights of a damaged session are exported, too."""
    try:
        card = model_card(session, policy)
    except RlhfError as error:
        return f"; without a card: {error}"
    (folder / CARD).write_text(card, encoding="utf-8")
    return ""


def _merge(session: SessionFolder, step: int, part: str, folder: Path, target: Path) -> None:
    """Merges into `folder`, which becomes `target`, the name that an error has."""
    # In a subprocess: this process never imports torch.
    module = [sys.executable, "-P", "-m", "engine.train.checkpoints.merge"]
    done = subprocess.run(  # noqa: S603 - our own module
        [*module, str(session.folder), str(step), part, str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=clean_environment(), text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"merging ended with {done.returncode}"]
        kind = UserInputError if done.returncode == UserInputError.exit_code else SessionError
        raise kind(errors[-1].replace(str(folder), str(target)))


def _write_lines(target: Path, rows: Iterable[Json]) -> int:
    """Writes rows while they are read. Returns their number."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in rows:
            count += 1
            yield f"{json.dumps(row, ensure_ascii=False)}\n".encode()

    try:
        write_output(target, lines())
    except OSError as error:
        raise UserInputError(f"cannot write {target}: {error.strerror}") from error
    return count
