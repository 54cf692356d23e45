"""The folder of a checkpoint: written atomically, and free of files that can execute code.

``checkpoints/step-000120/`` holds ``policy/`` (a Hugging Face model folder with its tokenizer),
``training/`` (optimiser state and value function, safetensors), ``state.json`` and ``COMPLETE``.
The folder is written under a temporary name, synced to disk and renamed. ``COMPLETE`` is created
last, after the supervisor has confirmed that the journal holds everything up to that step.

:mod:`engine.train.checkpoints.saver` writes the contents, and
:mod:`engine.train.checkpoints.shards` reads them.
"""

import hashlib
import math
import os
import shutil
from pathlib import Path

import msgspec

from engine.config.schema import RunConfig
from engine.config.settings import Settings, apply_settings, settings_of
from engine.errors import CheckpointError
from engine.metrics import SCORE
from engine.session.checkpoints import COMPLETE

FORMAT = 2
"""Format 1 has ``training/optimiser.safetensors`` and ``value.safetensors``, written by one rank.
Its tensors have the same names as the shards of format 2, so one reader handles both."""
SPARE = 1.1
"""Required free space, as a multiple of the checkpoint's estimated size."""


class TrainingState(msgspec.Struct, kw_only=True):
    """The state of a run at a step boundary, except its configuration and tensors."""

    step: int = 0
    """The last completed step."""
    episodes: int = 0
    sampling_seed: int
    seconds: float = 0.0
    """Training time over all attempts on this branch."""
    reward_mean: float = 0.0
    reward_std: float = 1.0
    baseline: float | None = None
    """The mean score kept by `ppo.baseline: running`."""
    reference: str = ""
    """Fingerprint of the frozen reference."""
    base: str = ""
    """Fingerprint of the weights under the adapters; empty without adapters."""
    threads: int = 0


class SavedState(TrainingState, kw_only=True):
    """The state in a checkpoint, with the live settings in force."""

    settings: Settings
    """The settings of the next step."""

    @classmethod
    def of(cls, state: TrainingState, config: RunConfig) -> "SavedState":
        """The state to save for a run."""
        return cls(**msgspec.structs.asdict(state), settings=settings_of(config))

    def restored(self, config: RunConfig) -> tuple[TrainingState, RunConfig]:
        """Splits into the run's state and `config` with the saved settings applied."""
        values = msgspec.structs.asdict(self)
        settings = values.pop("settings")
        return TrainingState(**values), apply_settings(config, settings)


class StateFile(msgspec.Struct, kw_only=True):
    """The content of state.json."""

    format: int = FORMAT
    state: SavedState
    score: float
    kl: float
    best: float | None = None
    """`train.best_metric` of the step; None if the step does not have that metric."""
    torch: str
    optimiser: str
    hashes: dict[str, str]
    """SHA-256 of every other file, by its path relative to the folder."""


def part_of(final: Path) -> Path:
    """The temporary path of a checkpoint while it is written; the same on every rank."""
    return final.with_name(f".{final.name}.part")


def check_space(checkpoints: Path, need: int) -> None:
    """Raises CheckpointError if there is no space for `need` bytes."""
    free = shutil.disk_usage(checkpoints).free
    if free < need * SPARE:
        raise CheckpointError(
            f"no room for a checkpoint in {checkpoints}: it needs {need / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free; make room, then save again"
        )


def publish(part: Path, final: Path, content: StateFile) -> int:
    """Writes state.json, syncs the folders to disk and renames `part` to `final`.

    All other files must be synced already (:func:`sync_and_hash`). Does not mark the checkpoint as
    complete; see :func:`complete`.

    Returns:
        The size of the checkpoint in bytes.
    """
    text = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (part / "state.json").write_bytes(text + b"\n")
    for path in [part / "state.json", *(d for d in part.rglob("*") if d.is_dir()), part]:
        _sync(path)
    if final.exists():  # incomplete, or of an abandoned branch
        final.rename(final.with_name(f".{final.name}.old"))
    part.rename(final)
    _sync(final.parent)
    clear_parts(final.parent)
    return sum(f.stat().st_size for f in final.rglob("*") if f.is_file())


def sync_and_hash(path: Path) -> str:
    """Syncs a file to disk and returns its SHA-256."""
    _sync(path)
    return _sha256(path)


def complete(folder: Path) -> None:
    """Creates the marker ``COMPLETE``; from then on the checkpoint can be resumed from.

    Raises:
        OSError: the marker cannot be written; no marker is left behind.
    """
    marker = folder / COMPLETE
    try:
        marker.touch()
        _sync(marker)
        _sync(folder)
    except OSError:
        marker.unlink(missing_ok=True)  # a save reported as failed must not count later
        raise


def clear_parts(checkpoints: Path) -> None:
    """Removes the remains of interrupted saves."""
    for leftover in checkpoints.glob(".*step-*"):
        shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Removes a checkpoint, ``COMPLETE`` first: a partly removed checkpoint never counts."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def to_remove(scores: dict[int, float], keep_last: int, keep_best: int) -> list[int]:
    """Selects the checkpoints that are neither among the newest nor among the best.

    Args:
        scores: `train.best_metric` by step, for the complete checkpoints of this branch.
        keep_last: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the highest score to keep in addition.

    Returns:
        The steps of the checkpoints to remove, in ascending order.
    """
    newest = sorted(scores)[-keep_last:]
    best = sorted(scores, key=lambda s: (scores[s], s), reverse=True)[:keep_best]
    return [s for s in sorted(scores) if s not in newest and s not in best]


def read_state(folder: Path, *, verify: bool = True) -> SavedState:
    """Reads the state of a checkpoint.

    Args:
        folder: the folder of the checkpoint.
        verify: check every file against its SHA-256; one rank of several is enough.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of a newer format.
    """
    content = _read_file(folder)
    for name, expected in content.hashes.items() if verify else ():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} does not match its hash; "
                "resume from another one with --from STEP"
            )
    return content.state


def read_best(folder: Path, metric: str) -> float:
    """Reads the value by which `train.keep_best` compares; -∞ if the checkpoint does not have it.

    Checkpoints of earlier versions have only the mean score.
    """
    content = _read_file(folder)
    best = content.score if content.best is None and metric == SCORE else content.best
    return -math.inf if best is None or math.isnan(best) else best


def read_optimiser(folder: Path) -> str:
    """Reads the kind of optimiser (see `shards.optimiser_kind`) whose state is stored."""
    return _read_file(folder).optimiser


def _read_file(folder: Path) -> StateFile:
    if not (folder / COMPLETE).exists():
        raise CheckpointError(f"there is no complete checkpoint at {folder}")
    try:
        content = msgspec.json.decode((folder / "state.json").read_bytes(), type=StateFile)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged: state.json: {error}") from error
    if content.format > FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} was written by a newer rlhf-tui; upgrade to use it"
        )
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
