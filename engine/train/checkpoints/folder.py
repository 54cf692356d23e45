"""A checkpoint's folder: whole or not at all, and nothing in it that could run code.

``checkpoints/step-000120/`` holds ``policy/`` (a Hugging Face model folder with its tokenizer),
``training/`` (optimiser state and value function, safetensors), ``state.json`` and ``COMPLETE``.
It is written under another name, forced to the disk, renamed, and only then marked COMPLETE, once
the supervisor has confirmed that the journal holds everything up to that step.

What lies in it is written by :mod:`engine.train.checkpoints.saver` and read by
:mod:`engine.train.checkpoints.shards`.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

import msgspec

from engine.config.schema import RunConfig
from engine.config.settings import Settings, apply_settings, settings_of
from engine.errors import CheckpointError

FORMAT = 2
"""1 had ``training/optimiser.safetensors`` and ``value.safetensors``, written by one rank. The
tensors in them are named as in today's shards, so one reader reads both."""
_NAME = re.compile(r"step-(\d{6,})")
SPARE = 1.1
"""Free space asked for, as a multiple of what the checkpoint is reckoned to take."""


class TrainingState(msgspec.Struct, kw_only=True):
    """What a run at a step boundary is besides its configuration and large tensors."""

    step: int = 0
    """The last completed step."""
    episodes: int = 0
    sampling_seed: int
    seconds: float = 0.0
    """Spent training, over all attempts of this timeline."""
    reward_mean: float = 0.0
    reward_std: float = 1.0
    baseline: float | None = None
    """Of `ppo.baseline: running`."""
    reference: str = ""
    """The frozen reference's fingerprint."""
    base: str = ""
    """That of the weights under the adapters, where there are any."""
    threads: int = 0


class SavedState(TrainingState, kw_only=True):
    """The state as a checkpoint holds it, with the live part of the configuration in force."""

    settings: Settings
    """For the next step."""

    @classmethod
    def of(cls, state: TrainingState, config: RunConfig) -> "SavedState":
        """What is saved of a run."""
        return cls(**msgspec.structs.asdict(state), settings=settings_of(config))

    def restored(self, config: RunConfig) -> tuple[TrainingState, RunConfig]:
        """The run's state, and its configuration with the saved settings in force."""
        values = msgspec.structs.asdict(self)
        settings = values.pop("settings")
        return TrainingState(**values), apply_settings(config, settings)


class StateFile(msgspec.Struct, kw_only=True):
    """state.json."""

    format: int = FORMAT
    state: SavedState
    score: float
    kl: float
    torch: str
    optimiser: str
    hashes: dict[str, str]
    """SHA-256 of each other file, by its path in the folder."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:06d}"


def completed(checkpoints: Path) -> dict[int, Path]:
    """Whole checkpoints by step, in order."""
    found = {}
    for marker in checkpoints.glob("step-*/COMPLETE"):
        if match := _NAME.fullmatch(marker.parent.name):
            found[int(match[1])] = marker.parent
    return dict(sorted(found.items()))


def part_of(final: Path) -> Path:
    """The name a checkpoint is written under until it is whole; the same on every rank."""
    return final.with_name(f".{final.name}.part")


def check_space(checkpoints: Path, need: int) -> None:
    """Whether `need` bytes fit. Raises CheckpointError."""
    free = shutil.disk_usage(checkpoints).free
    if free < need * SPARE:
        raise CheckpointError(
            f"no room for a checkpoint in {checkpoints}: it needs {need / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free; make room, then save again"
        )


def publish(part: Path, final: Path, content: StateFile) -> int:
    """Writes state.json, forces the folders to the disk and gives the checkpoint its name.

    The other files must have been forced to the disk before (:func:`seal` does it).

    Returns:
        Its size in bytes.
    """
    text = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (part / "state.json").write_bytes(text + b"\n")
    for path in [part / "state.json", *(d for d in part.rglob("*") if d.is_dir()), part]:
        _sync(path)
    if final.exists():  # incomplete, or of an earlier timeline
        final.rename(final.with_name(f".{final.name}.old"))
    part.rename(final)
    _sync(final.parent)
    clear_parts(final.parent)
    return sum(f.stat().st_size for f in final.rglob("*") if f.is_file())


def sync_and_hash(path: Path) -> str:
    """Forces a file to the disk and returns its SHA-256."""
    _sync(path)
    return _sha256(path)


def complete(folder: Path) -> None:
    """Marks it as whole: from now on it can be resumed from."""
    marker = folder / "COMPLETE"
    try:
        marker.touch()
        _sync(marker)
        _sync(folder)
    except OSError:
        marker.unlink(missing_ok=True)  # what is told as failed must not count later
        raise


def clear_parts(checkpoints: Path) -> None:
    """Removes what an interrupted write or removal left."""
    for left in checkpoints.glob(".*step-*"):
        shutil.rmtree(left)


def remove(folder: Path) -> None:
    """Takes COMPLETE away first, so that a half removed checkpoint is never taken for one."""
    (folder / "COMPLETE").unlink(missing_ok=True)
    shutil.rmtree(folder)


def to_remove(scores: dict[int, float], keep_last: int, keep_best: int) -> list[int]:
    """Steps of the checkpoints that are neither among the newest nor among the best.

    Args:
        scores: mean score by step, of the whole checkpoints of this timeline.
        keep_last: how many of the newest stay.
        keep_best: how many of those with the highest score stay besides.
    """
    newest = sorted(scores)[-keep_last:]
    best = sorted(scores, key=lambda s: (scores[s], s), reverse=True)[:keep_best]
    return [s for s in sorted(scores) if s not in newest and s not in best]


def read_state(folder: Path, *, verify: bool = True) -> SavedState:
    """The state of a whole checkpoint.

    Args:
        folder: the checkpoint's.
        verify: hold every file against its SHA-256 first; of many ranks one does.

    Raises:
        CheckpointError: it is not whole, was damaged, or is of another format.
    """
    content = _read_file(folder)
    for name, expected in content.hashes.items() if verify else ():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} is not what was written; "
                "resume from another one with --from STEP"
            )
    return content.state


def read_score(folder: Path) -> float:
    """The mean score of the step it was saved after."""
    return _read_file(folder).score


def read_optimiser(folder: Path) -> str:
    """The kind of optimiser whose state it holds."""
    return _read_file(folder).optimiser


def _read_file(folder: Path) -> StateFile:
    if not (folder / "COMPLETE").exists():
        raise CheckpointError(f"there is no whole checkpoint at {folder}")
    try:
        content = msgspec.json.decode((folder / "state.json").read_bytes(), type=StateFile)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged: state.json: {error}") from error
    if content.format > FORMAT:
        raise CheckpointError(f"the checkpoint {folder} is of a newer rlhf-tui; upgrade to use it")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
