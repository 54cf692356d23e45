"""Commands that manage sessions and the machine: rm, export, doctor."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import msgspec

from engine import starter
from engine.config.sections.rollout import RolloutConfig
from engine.errors import NoSuchSessionError, RlhfError, SessionError, UserInputError
from engine.journal.json_values import Json
from engine.journal.preference_pairs import preference_pairs
from engine.journal.samples import SampleReader, with_judgements
from engine.launch.environment import clean_environment
from engine.launch.rollout.engine import TESTED_VLLM, find_vllm, rollout_python
from engine.launch.start import check_average, checkpoint_steps
from engine.protocol import sockets
from engine.session.access import open_to_umask
from engine.session.checkpoints import AVERAGED_POLICY, POLICY, checkpoint_path
from engine.session.folder import SessionFolder
from engine.session.temporary_folders import written_whole
from rlhf_tui import format as fmt
from rlhf_tui.commands.checkpoint_step import StepChoice, checkpoint_step, step_choice
from rlhf_tui.commands.options import (
    complete_name,
    existing,
    is_terminal,
    json_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.output_file import write_output
from rlhf_tui.report.model_card import CARD, ExportedPolicy, model_card

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "textual")


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@sessions_option
@click.option(
    "-y", "--yes", is_flag=True, help="Delete without confirmation; needed without a terminal."
)
def rm(root: Path, names: tuple[str, ...], yes: bool) -> None:
    """Delete sessions with all their checkpoints."""
    sessions = [existing(root, name) for name in dict.fromkeys(names)]
    if not yes and not os.isatty(0):  # the output may be piped; the question is on stderr
        listed = ", ".join(f"'{session.name}'" for session in sessions)
        raise UserInputError(
            f"stdin is not a terminal: give -y to delete session {listed} without confirmation"
        )
    for session in sessions:
        _delete(session, yes=yes)


def _delete(session: SessionFolder, *, yes: bool) -> None:
    """Deletes a session, unless the answer to the question is no."""
    lock = session.acquire()
    try:
        freed = fmt.freed(session.disk_usage())
        question = f"delete session '{session.name}' and its checkpoints ({freed})?"
        if not yes and not click.confirm(question, err=True):
            return
        shutil.rmtree(session.folder)
    except OSError as error:
        raise SessionError(f"cannot delete {session.folder}: {error}") from error
    finally:
        lock.release()


@click.command()
@name_argument
@sessions_option
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Copy the policy, a model folder.",
)
@click.option("--merged", is_flag=True, help="With --policy: merge LoRA adapters into the model.")
@click.option(
    "--ema", "averaged", is_flag=True, help="With --policy: the averaged policy of train.ema."
)
@click.option(
    "--samples", type=click.Path(path_type=Path), metavar="FILE", help="Write samples, JSONL."
)
@click.option(
    "--preferences",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write judged pairs of responses, chosen and rejected, JSONL.",
)
@click.option(
    "--step", "choice", type=step_choice, metavar="STEP",
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
    of_policy = merged or averaged or best or choice
    if policy is None and ((samples is None and preferences is None) or of_policy):
        raise UserInputError(
            "export needs --policy DIR, --samples FILE or --preferences FILE; "
            "--step, --merged, --ema and --best need --policy"
        )
    if best and choice:
        raise UserInputError("give --step or --best, not both")
    if policy is not None:
        step = checkpoint_step(session, "best" if best else choice or "last")
        if step not in (steps := checkpoint_steps(session)):
            listed = ", ".join(map(str, steps)) or "none yet"
            raise NoSuchSessionError(
                f"session '{name}' has no checkpoint of step {step} to export (it has: {listed})"
            )
        part = AVERAGED_POLICY if averaged else POLICY
        say(_export_policy(session, step, policy, part, merged=merged))
    if samples is not None:
        with SampleReader(session) as reader:
            rows = with_judgements(session, reader.newest())
        _write_lines(samples, (row.as_json() for row in rows))
        say(f"wrote {fmt.plural(len(rows), 'sample')} to {samples}")
    if preferences is not None:
        found = preference_pairs(session)
        _write_lines(preferences, (msgspec.structs.asdict(pair) for pair in found))
        say(f"wrote {fmt.plural(len(found), 'pair')} to {preferences}")


def _export_policy(
    session: SessionFolder, step: int, target: Path, part: str, *, merged: bool
) -> str:
    """Writes a model folder, `part` of a checkpoint. Returns a line that describes it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserInputError(f"--policy: {target} exists already; give a new or empty folder")
    source = checkpoint_path(session.checkpoints, step) / part
    if part == AVERAGED_POLICY:
        check_average(session, step)
    what = "averaged policy" if part == AVERAGED_POLICY else "policy"
    config = session.config()
    adapted = config.lora.rank is not None
    try:
        with written_whole(target.resolve()) as folder:
            if adapted and merged:
                _merge(session, step, part, folder)
            else:
                shutil.copytree(source, folder, dirs_exist_ok=True)
            exported = ExportedPolicy(
                step, averaged=part == AVERAGED_POLICY, adapters=adapted and not merged
            )
            no_card = _write_card(session, exported, folder)
            open_to_umask(folder)
    except OSError as error:
        raise UserInputError(f"--policy: cannot write {target}: {error}") from error
    if adapted and merged:
        return f"the {what} of step {step} is in {target}, adapters merged{no_card}"
    if adapted:
        which = "averaged adapters" if part == AVERAGED_POLICY else "adapters"
        base = config.model.policy
        return f"the {which} of step {step} are in {target}; base model: {base}{no_card}"
    note = "; all weights were trained, so there is nothing to merge" if merged else ""
    return f"the {what} of step {step} is in {target}{note}{no_card}"


def _write_card(session: SessionFolder, policy: ExportedPolicy, folder: Path) -> str:
    """Writes the card. Returns why there is none: weights are saved from a damaged session, too."""
    try:
        card = model_card(session, policy)
    except RlhfError as error:
        return f"; without a card: {error}"
    (folder / CARD).write_text(card, encoding="utf-8")
    return ""


def _merge(session: SessionFolder, step: int, part: str, target: Path) -> None:
    # In a subprocess: this process never imports torch.
    module = [sys.executable, "-P", "-m", "engine.train.checkpoints.merge"]
    done = subprocess.run(  # noqa: S603 - our own module
        [*module, str(session.folder), str(step), part, str(target)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=clean_environment(), text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"merging ended with {done.returncode}"]
        kind = UserInputError if done.returncode == UserInputError.exit_code else SessionError
        raise kind(errors[-1])


def _write_lines(target: Path, rows: Iterable[Json]) -> None:
    try:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_output(target, "".join(lines).encode())
    except OSError as error:
        raise UserInputError(f"cannot write {target}: {error.strerror}") from error


class FolderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions folder."""

    folder: str
    writable: bool
    free_gb: float
    sockets: bool
    """Whether a Unix socket can be created there."""


class TerminalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The terminal."""

    term: str | None
    full_screen: bool


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What `doctor` prints, in this order. The fields are keys of its --json."""

    python: str
    packages: dict[str, str | None]
    """Version by package; None if it is not installed."""
    vllm: str
    """The vLLM that `rollout.engine: vllm` would use, and its Python; or `none`."""
    cores: int
    gpus: list[str]
    sessions: FolderFacts
    starter: bool
    """Whether the starter models of the demo are installed."""
    terminal: TerminalFacts


@click.command()
@sessions_option
@json_option
def doctor(root: Path, as_json: bool) -> None:
    """Check this machine: versions, GPUs, disk, sockets, terminal."""
    facts = MachineFacts(
        python=sys.version.split()[0],
        packages={p: _version(p) for p in PACKAGES},
        vllm=_vllm(),
        cores=len(os.sched_getaffinity(0)),
        gpus=_gpus(),
        sessions=_folder(root.resolve()),
        starter=all((starter.FOLDER / p).exists() for p in starter.PARTS.values()),
        terminal=TerminalFacts(term=os.environ.get("TERM"), full_screen=is_terminal()),
    )
    problems = _problems(facts)
    shown: Json = msgspec.to_builtins(facts)
    if as_json:
        print_json(shown | {"problems": problems})
    else:
        for key, value in shown.items():
            say(f"{key:<10} {_fact_text(value)}")
        for problem in problems:
            say(f"problem: {problem}")
    sys.exit(1 if problems else 0)


def _fact_text(value: object) -> str:
    """A fact for people: `yes` and `no`, lists and mappings on one line."""
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(_fact_text, value)) or "none"
        case dict():
            return ", ".join(f"{_title(k)} {_fact_text(v)}" for k, v in value.items())
        case None:
            return "none"
        case _:
            return str(value)


def _title(key: str) -> str:
    return key.replace("_gb", " GB").replace("_", " ")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> str:
    """Which build of vLLM there is, and where; why it cannot be used, if that is known."""
    python = rollout_python(RolloutConfig(engine="vllm"))
    try:
        found = find_vllm(python)
    except UserInputError as error:
        return str(error)
    if found is None:
        return "none (only rollout.engine: vllm needs it; see make vllm)"
    tested = found.split()[-1].startswith(f"{TESTED_VLLM}.")
    note = "" if tested else f"; tested with {TESTED_VLLM}"
    return f"{found} ({python}){note}"


def _gpus() -> list[str]:
    import pynvml  # noqa: PLC0415 - only doctor needs it

    from engine.nvml import gpu_handles  # noqa: PLC0415 - as above

    with gpu_handles() as handles:
        try:
            return [str(pynvml.nvmlDeviceGetName(h)) for h in handles]
        except pynvml.NVMLError:
            return []


def _folder(root: Path) -> FolderFacts:
    nearest = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    return FolderFacts(
        folder=str(root),
        writable=os.access(nearest, os.W_OK),
        free_gb=round(free / 1e9, 1),
        sockets=_sockets_work(nearest),
    )


def _sockets_work(folder: Path) -> bool:
    try:
        sock, path = sockets.listen(folder)
    except SessionError:
        return False
    sock.close()
    path.unlink(missing_ok=True)
    return True


def _problems(facts: MachineFacts) -> list[str]:
    found = [f"{p} is not installed" for p, v in facts.packages.items() if v is None]
    if not facts.sessions.writable:
        found.append(f"{facts.sessions.folder} is not writable; give --sessions DIR")
    if facts.sessions.free_gb < 1:
        found.append("less than 1 GB of disk is free in the sessions folder")
    if not facts.starter:
        found.append("the starter models are missing; install rlhf-tui again")
    if facts.gpus and "+cpu" in (facts.packages["torch"] or ""):
        found.append("there is a GPU but torch is a CPU build; install a CUDA build of torch")
    return found
