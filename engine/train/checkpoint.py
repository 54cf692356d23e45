"""Checkpoints: whole or not at all, and nothing in them that could run code.

``checkpoints/step-000120/`` holds ``policy/`` (a Hugging Face model folder with its tokenizer),
``training/`` (optimiser state and value function, safetensors), ``state.json`` and ``COMPLETE``.
It is written under another name, forced to the disk, renamed, and only then marked COMPLETE, once
the supervisor has confirmed that the journal holds everything up to that step.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.errors import CheckpointError
from engine.settings import Settings
from engine.train.models import LanguageModel
from engine.train.pretrained import save_lm

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
SPARE = 1.1
"""Free space asked for, as a multiple of what the checkpoint is reckoned to take."""


class TrainingState(msgspec.Struct, kw_only=True):
    """Everything about a run at a step boundary that is not a large tensor."""

    step: int = 0
    """The last completed step."""
    episodes: int = 0
    sampling_seed: int
    settings: Settings
    """In force for the next step."""
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


class _StateFile(msgspec.Struct, kw_only=True):
    """state.json."""

    format: int
    state: TrainingState
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


def write(
    checkpoints: Path,
    state: TrainingState,
    policy: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    optimiser: torch.optim.Optimizer,
    *,
    score: float,
    kl: float,
) -> tuple[Path, int]:
    """Writes all but COMPLETE, and puts it in place.

    Returns:
        The folder and its size in bytes.

    Raises:
        CheckpointError: the disk has too little room, or writing failed; nothing is left behind.
    """
    final = folder_of(checkpoints, state.step)
    part = checkpoints / f".{final.name}.{os.getpid()}"
    _check_space(checkpoints, policy, optimiser)
    try:
        clear_parts(checkpoints)
        (part / "training").mkdir(parents=True)
        save_lm(policy.lm, part / "policy")
        tokenizer.save_pretrained(part / "policy")
        save_file(
            _optimiser_tensors(policy, optimiser), part / "training" / "optimiser.safetensors"
        )
        if policy.value_head is not None:
            save_file(_value_tensors(policy), part / "training" / "value.safetensors")
        files = [f for f in sorted(part.rglob("*")) if f.is_file()]
        content = _StateFile(
            format=FORMAT,
            state=state,
            score=score,
            kl=kl,
            torch=str(torch.__version__),
            optimiser=optimiser_kind(optimiser),
            hashes={str(f.relative_to(part)): _sha256(f) for f in files},
        )
        text = msgspec.json.format(msgspec.json.encode(content), indent=1)
        (part / "state.json").write_bytes(text + b"\n")
        files.append(part / "state.json")
        for path in [*files, *(d for d in part.rglob("*") if d.is_dir()), part]:
            _sync(path)
        if final.exists():  # incomplete, or of an earlier timeline
            final.rename(checkpoints / f".old-{final.name}.{os.getpid()}")
        part.rename(final)
        _sync(checkpoints)
        clear_parts(checkpoints)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
    return final, sum(f.stat().st_size for f in final.rglob("*") if f.is_file())


def complete(folder: Path) -> None:
    """Marks it as whole: from now on it can be resumed from."""
    marker = folder / "COMPLETE"
    marker.touch()
    _sync(marker)
    _sync(folder)


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


def read_state(folder: Path, *, verify: bool = True) -> TrainingState:
    """The state of a whole checkpoint.

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


def load_training(folder: Path, policy: LanguageModel, optimiser: torch.optim.Optimizer) -> None:
    """Puts the value function and the optimiser's state back, bit for bit.

    The policy's weights are loaded from ``policy/`` like any model's.

    Raises:
        CheckpointError: the files do not fit the model, or the optimiser is another one.
    """
    kind = _read_file(folder).optimiser
    if kind != optimiser_kind(optimiser):
        # Fused and unfused AdamW round differently: a resumed run would not be the same run.
        raise CheckpointError(
            f"the checkpoint {folder} was written with {kind}, this machine would go on with "
            f"{optimiser_kind(optimiser)}: fork instead of resuming"
        )
    if policy.value_head is not None:
        value = load_file(folder / "training" / "value.safetensors")
        missing = policy.load_state_dict(value, strict=False).unexpected_keys
        if missing:
            raise CheckpointError(f"{folder} holds a value function of another model: {missing[0]}")
    tensors = load_file(folder / "training" / "optimiser.safetensors")
    parameters = dict(policy.named_parameters())
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"{folder} holds the optimiser's state of another model: {name}")
        parameter = parameters[name]
        # As torch's own AdamW keeps it: the step count stays float32, where the fused one wants it.
        optimiser.state[parameter][part] = tensor.to(parameter.device)


def optimiser_kind(optimiser: torch.optim.Optimizer) -> str:
    """What decides the rounding of a step."""
    fused = " (fused)" if optimiser.defaults.get("fused") else ""
    return type(optimiser).__name__ + fused


def _optimiser_tensors(policy: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.named_parameters():
        state: dict[str, Any] = optimiser.state.get(parameter, {})
        for part, value in state.items():
            tensors[f"{part}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _value_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    frozen = {k for k, p in policy.named_parameters() if not p.requires_grad}
    return {
        k: v.detach().cpu().contiguous()
        for k, v in policy.state_dict().items()
        if k.startswith(("value_head.", "value_trunk.")) and k not in frozen
    }


def _check_space(checkpoints: Path, policy: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    need = sum(p.numel() * p.element_size() for p in trained)
    need += sum(
        t.numel() * t.element_size() for t in _optimiser_tensors(policy, optimiser).values()
    )
    free = shutil.disk_usage(checkpoints).free
    if free < need * SPARE:
        raise CheckpointError(
            f"no room for a checkpoint in {checkpoints}: it needs {need / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free; make room, then save again"
        )


def _read_file(folder: Path) -> _StateFile:
    if not (folder / "COMPLETE").exists():
        raise CheckpointError(f"there is no whole checkpoint at {folder}")
    try:
        content = msgspec.json.decode((folder / "state.json").read_bytes(), type=_StateFile)
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
