"""The folder of a checkpoint: written atomically, and free of files that can execute code.

``checkpoints/step-000120/`` holds ``policy/`` (a Hugging Face model folder with its tokenizer),
``training/`` (optimiser state and value function, safetensors), ``state.json`` and ``COMPLETE``.
With `train.ema` also the averaged policy, as a model in ``policy-ema/`` and to resume from in
``ema/``.
The folder is written under a temporary name, synced to disk and renamed. ``COMPLETE`` is created
last, after the supervisor has confirmed that the journal holds everything up to that step.

:mod:`engine.train.checkpoints.saver` writes the contents, and
:mod:`engine.train.checkpoints.shards` reads them.
"""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from engine.config.schema import RunConfig
from engine.config.sections.model import ModelConfig
from engine.config.settings import Settings, apply_settings, invalid_values, settings_of
from engine.errors import CheckpointError, DamagedCheckpointError
from engine.examined import examined
from engine.metrics import SCORE, SCORES
from engine.session.access import read_bytes
from engine.session.checkpoints import (
    COMPLETE,
    STATE,
    find_damage,
    incomplete_checkpoints,
    raise_if_transient,
    sha256,
    sync,
)
from engine.train.ppo.entropy import EntropyBonus

FORMAT = 2
"""Format 1 has ``training/optimiser.safetensors`` and ``value.safetensors``, written by one rank.
Its tensors have the same names as the shards of format 2, so one reader handles both."""
FULL_DISK_TEXTS = ("no room for a checkpoint", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""Parts of the messages of saves that fail because the disk or a quota is full."""
JOURNAL_ROOM = 1 << 20
"""Bytes that must be free for the journal of a step."""
SPACE_FACTOR = 1.1
"""Required free space, as a multiple of the checkpoint's estimated size."""


class FrozenModels(msgspec.Struct, frozen=True):
    """What the models that are not trained were read from."""

    policy: str
    """Under adapters; also the reference, unless there is another one."""
    reference: str
    dtype: str
    """The dtype in which they are held."""

    @classmethod
    def of(cls, model: ModelConfig) -> "FrozenModels":
        """Those of a configuration."""
        policy = _named(model.policy, model.revision, model.gguf_file)
        given = _named(model.reference or "", model.reference_revision, None)
        return cls(policy, policy if model.reference_is_policy else given, model.dtype)


def _named(name: str, revision: str | None, file: str | None) -> str:
    """`name (revision, file)`."""
    details = ", ".join(filter(None, (revision, file)))
    return f"{name} ({details})" if details else name


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
    reward_scales: dict[str, tuple[float, float]] = {}
    """Reward source → mean and standard deviation, for sources with a `normalise` of their own."""
    baseline: float | None = None
    """The mean score kept by `ppo.baseline: running`."""
    entropy_bonus: EntropyBonus | None = None
    """The weight of the entropy bonus with `ppo.entropy_target`; None before its first step."""
    value_weights: list[float] = []
    """Weights and bias of `model.value: reward_model`; empty before the first step."""
    value_positions: int = 0
    """What positions are divided by for these weights: `rollout.max_new_tokens` as they began."""
    scored_by: str = ""
    """The reward that scores, scales and baseline belong to, see
    :attr:`engine.config.sections.reward.RewardConfig.scored_by`. Empty in earlier versions."""
    reference: str = ""
    """Fingerprint of the reference, as it is now."""
    reference_updated: int = 0
    """The last step before whose successor `kl.reference_update` changed the reference; 0 if there
    was none. After an update, checkpoints hold the reference."""
    base: str = ""
    """Fingerprint of the weights under the adapters; empty without adapters."""
    frozen: FrozenModels | None = None
    """What those fingerprints are of, which a fork may change; None in earlier versions."""
    threads: int = 0


class SavedState(TrainingState, kw_only=True):
    """The state in a checkpoint, with the live settings."""

    settings: Settings
    """The settings right after the step, without later commands, which the journal holds. Earlier
    versions saved those of the next step."""

    @classmethod
    def of(
        cls, state: TrainingState, config: RunConfig, settings: Settings | None = None
    ) -> "SavedState":
        """The state to save for a run; with the settings of `config` if none are given."""
        return cls(**msgspec.structs.asdict(state), settings=settings or settings_of(config))

    def restored(
        self, config: RunConfig, warn: Callable[[str], None]
    ) -> tuple[TrainingState, RunConfig]:
        """Splits into the run's state and `config` with the saved settings applied.

        Settings that are out of range, as an earlier version accepted them, keep the value of
        `config`; `warn` is called with a sentence about each.
        """
        values = msgspec.structs.asdict(self)
        saved = msgspec.structs.asdict(values.pop("settings"))
        saved["micro_batch_size"] = saved["micro_batch_size"] or config.ppo.micro_batch_size
        for name, problem in invalid_values(saved).items():
            saved[name] = getattr(settings_of(config), name)
            warn(f"the checkpoint's value is not used, {saved[name]} is: {problem}")
        return TrainingState(**values), apply_settings(config, Settings(**saved))


class MetricValue(msgspec.Struct, frozen=True):
    """`train.best_metric` at the step of a checkpoint."""

    metric: str
    """Its name, since a resume may choose another one."""
    value: float | None
    """None if the step does not have that metric."""

    @property
    def rank(self) -> float:
        """The value to sort by; -∞ if there is none."""
        return -math.inf if self.value is None or math.isnan(self.value) else self.value


class StateFile(msgspec.Struct, kw_only=True):
    """The content of state.json."""

    format: int = FORMAT
    state: SavedState
    score: float | None
    kl: float | None
    """None for a value that is not finite, which JSON cannot hold."""
    best: MetricValue | None = None
    """None in earlier versions."""
    torch: str
    optimiser: str
    hashes: dict[str, str]
    """SHA-256 of every other file, by its path relative to the folder."""


def part_of(final: Path) -> Path:
    """The temporary path of a checkpoint while it is written; the same on every rank."""
    return final.with_name(f".{final.name}.part")


def check_space(checkpoints: Path, need: int) -> None:
    """Raises CheckpointError if there is no space for `need` bytes."""
    free, need = shutil.disk_usage(checkpoints).free, math.ceil(need * SPACE_FACTOR)
    if free < need:
        raise CheckpointError(
            f"no room for a checkpoint in {checkpoints}: it needs {need / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free; make room"
        )


def has_room(checkpoints: Path) -> bool:
    """Whether a file can be written; unlike the free space of the disk, this knows of quotas."""
    try:
        with tempfile.TemporaryFile(dir=checkpoints) as file:
            file.write(bytes(JOURNAL_ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return True


def lacks_room(problem: str) -> bool:
    """Whether a save failed because the disk or a quota is full; `problem` is its message.

    The message decides because it is the same on all ranks.
    """
    return any(text in problem for text in FULL_DISK_TEXTS)


def publish(part: Path, final: Path, content: StateFile, aside: Path | None = None) -> int:
    """Writes state.json, syncs the folders to disk and renames `part` to `final`.

    All other files must be synced already (:func:`sync_and_hash`). Does not mark the checkpoint as
    complete; see :func:`engine.session.checkpoints.mark_complete`.

    Args:
        part: what is written.
        final: its place. What is there is removed.
        content: of state.json.
        aside: where to what is there is moved instead, if nothing is at that path yet.

    Returns:
        The size of the checkpoint in bytes.
    """
    text = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (part / STATE).write_bytes(text + b"\n")
    for path in [part / STATE, *(d for d in part.rglob("*") if d.is_dir()), part]:
        sync(path)
    if final.exists():  # incomplete, or of an abandoned branch
        old = final.with_name(f".{final.name}.old")
        final.rename(old if aside is None or aside.exists() else aside)
    part.rename(final)
    sync(final.parent)
    clear_parts(final.parent)
    return sum(f.stat().st_size for f in final.rglob("*") if f.is_file())


def sync_and_hash(path: Path) -> str:
    """Syncs a file to disk and returns its SHA-256."""
    sync(path)
    return sha256(path)


def clear_parts(checkpoints: Path) -> None:
    """Removes the remains of interrupted saves."""
    for leftover in checkpoints.glob(".*step-*"):
        shutil.rmtree(leftover)


def clear_interrupted(checkpoints: Path) -> None:
    """Removes the remains of interrupted saves and removals; call it while nothing is saved."""
    clear_parts(checkpoints)
    for leftover in incomplete_checkpoints(checkpoints):
        shutil.rmtree(leftover, ignore_errors=True)  # such as a link to another disk


def to_remove(
    scores: dict[int, float],
    keep_last: int,
    keep_best: int,
    alerts: Sequence[int] = (),
    kept: Collection[int] = (),
) -> list[int]:
    """Selects the checkpoints that are neither among the newest nor among the best.

    One more is kept: the newest before an alert, the first of them that has any before it.
    Those of `kept` are kept as well, and do not count.

    Args:
        scores: `train.best_metric` by step, for the complete checkpoints of this branch.
        keep_last: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the highest score to keep in addition.
        alerts: steps of alerts, in ascending order.
        kept: steps of the checkpoints that an operator saved.

    Returns:
        The steps of the checkpoints to remove, in ascending order.
    """
    counted = sorted(s for s in scores if s not in kept)
    newest = counted[-keep_last:]
    best = sorted(counted, key=lambda s: (scores[s], s), reverse=True)[:keep_best]
    before = next((older for alert in alerts if (older := [s for s in scores if s < alert])), [])
    staying = {*newest, *best, *sorted(before)[-1:]}
    return [s for s in counted if s not in staying]


def read_state(folder: Path) -> SavedState:
    """Reads the state of a checkpoint, and checks every file against its SHA-256.

    Raises:
        DamagedCheckpointError: a file is not as it was written.
        CheckpointError: the checkpoint is incomplete, of a newer format, or may not be read.
        OSError: a file cannot be read for another reason that may pass.
    """
    try:
        content = _read_file(folder)
        problem = find_damage(folder)
    except PermissionError as error:  # which a restart would meet again
        raise CheckpointError(f"the checkpoint {folder} cannot be read: {error}") from error
    if problem:
        raise _damaged(folder, problem)
    return content.state


def read_best(folder: Path, metric: str, scored_by: str, recorded: float | None = None) -> float:
    """Reads the value that `train.keep_best` compares; -∞ if there is none.

    Each checkpoint has the mean score, and the `train.best_metric` configured when it was saved.

    Args:
        folder: the folder of the checkpoint.
        metric: the metric to compare by.
        scored_by: the reward in force; scores of another one are not comparable.
        recorded: the metric of that step in the journal, for a checkpoint that does not have it.
    """
    content = _read_file(folder)
    if metric in SCORES and content.state.scored_by not in ("", scored_by):
        return -math.inf
    best = content.best
    if best is None or best.metric != metric:
        best = MetricValue(metric, content.score if metric == SCORE else None)
    return (best if best.value is not None else MetricValue(metric, recorded)).rank


def read_optimiser(folder: Path) -> str:
    """Reads the kind of optimiser (see `shards.optimiser_kind`) whose state is stored."""
    return _read_file(folder).optimiser


def _read_file(folder: Path) -> StateFile:
    if not (folder / COMPLETE).exists():
        raise CheckpointError(f"there is no complete checkpoint at {folder}")
    try:
        content = msgspec.json.decode(read_bytes(folder / STATE), type=examined(StateFile))
    except (OSError, ValueError, RecursionError) as error:  # not readable; not JSON
        raise_if_transient(error)
        raise _damaged(folder, f"{STATE}: {error}") from error
    if content.format > FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} was written by a newer rlhf-tui; upgrade to use it"
        )
    return content


def _damaged(folder: Path, problem: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint {folder} is damaged: {problem}")
