"""The tensors of a checkpoint, shared among the ranks that write and read them.

torch.distributed.checkpoint plans who writes what and who reads what; it stores safetensors here.
Its own format keeps a pickle beside the tensors, and a pickle that is loaded can run code.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from engine.errors import CheckpointError
from engine.train.checkpoints.folder import read_optimiser
from engine.train.models.language_model import LanguageModel

FILE_SIZE = 4 << 30
"""Bytes of tensors to a file."""
VALUE = ("value_head.", "value_trunk.")

# That a rank is alone is no surprise here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def training_tensors(policy: LanguageModel, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The value function, and the optimiser's state as ``exp_avg/NAME_OF_PARAMETER``; not copied.

    Where the policy is sharded they are DTensors, but for the step counts.
    """
    tensors = _value_tensors(policy)  # first: puts gathered parameters back into shards
    left = len(optimiser.state)
    for name, parameter in policy.named_parameters():
        if parameter in optimiser.state:
            state: dict[str, Any] = optimiser.state[parameter]
            tensors |= {f"{part}/{name}": value.detach() for part, value in state.items()}
            left -= 1
    if left:
        raise RuntimeError(f"the optimiser has {left} parameters that the policy has not")
    # An optimiser that was loaded has its state in another order than one that has stepped.
    return dict(sorted(tensors.items()))


def optimiser_kind(optimiser: torch.optim.Optimizer) -> str:
    """What decides the rounding of a step."""
    fused = " (fused)" if optimiser.defaults.get("fused") else ""
    return type(optimiser).__name__ + fused


def share(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What this rank has to write: its shards, and its part of the tensors that all ranks hold.

    Taken before anything is copied, so that the copies of all ranks of a machine make one copy.
    """
    if group is None:
        return tensors
    rank, loads = dist.get_rank(group), [0] * dist.get_world_size(group)
    mine: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        writer = loads.index(min(loads))
        loads[writer] += tensor.nbytes
        if writer == rank:
            mine[name] = tensor
    return mine


def local_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of what this rank holds of them."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())


def save_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes what each rank has of some tensors into one folder. All ranks call it.

    Args:
        folder: there already, and the same for all.
        tensors: this rank's, on the CPU: shards, or whole tensors that no other rank gives.
        group: of all ranks, able to communicate from the CPU; None for a rank alone.

    Raises:
        CheckpointError: any rank failed; on all ranks.
    """
    try:
        save(
            tensors,
            storage_writer=_ShardWriter(str(folder), save_distributed=True),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Puts the tensors of a folder of shards together, on the CPU. One rank calls it."""
    stored = _stored(folder)
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def load_training(
    folder: Path,
    policy: LanguageModel,
    optimiser: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Puts the value function and the optimiser's state back, bit for bit. All ranks call it.

    Each rank reads only what it holds, whatever the number of ranks and the sharding were when it
    was written. The policy's weights are loaded from ``policy/`` like any model's.

    Args:
        folder: the checkpoint's.
        policy: sharded already, where it will be.
        optimiser: new, of this policy's parameters.
        group: of all ranks, able to communicate from the CPU; None for a rank alone.

    Raises:
        CheckpointError: the files do not fit the model, or the optimiser is another one.
    """
    kind = read_optimiser(folder)
    if kind != optimiser_kind(optimiser):
        # Fused and unfused AdamW round differently: a resumed run would not be the same run.
        raise CheckpointError(
            f"the checkpoint {folder} was written with {kind}, this machine would go on with "
            f"{optimiser_kind(optimiser)}: fork instead of resuming"
        )
    stored = _stored(folder / "training")
    tensors = _value_tensors(policy)
    parameters = dict(policy.named_parameters())
    for key in (k for k in stored if not k.startswith(VALUE)):
        part, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"{folder} holds the optimiser's state of another model: {name}")
        parameter = parameters[name]
        scalar = not len(stored[key].size) and parameter.dim()
        # As torch's own AdamW keeps it: the step count stays float32 and whole on every rank, and
        # is where the fused one wants it.
        tensors[key] = optimiser.state[parameter][part] = (
            torch.zeros((), dtype=stored[key].properties.dtype, device=parameter.device)
            if scalar
            else torch.zeros_like(parameter, dtype=stored[key].properties.dtype)
        )
    if wrong := {k for k in stored if k.startswith(VALUE)} ^ set(_value_tensors(policy)):
        raise CheckpointError(f"{folder} holds a value function of another model: {min(wrong)}")
    try:
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder / "training")),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"cannot load {folder}: {_first_failure(error)}") from error


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes and dtypes of what a folder of safetensors holds, from their headers."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {k: m for k, m in found.items() if isinstance(m, TensorStorageMetadata)}


def _value_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """But for what lies under adapters: it is the model's that the configuration names."""
    tensors = policy.state_dict()
    frozen = {k for k, p in policy.named_parameters() if not p.requires_grad}
    return {k: v for k, v in tensors.items() if k.startswith(VALUE) and k not in frozen}


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause}"


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes a rank's share as torch's own writer does, in the same layout, but for two things.

    torch's makes the whole file in memory, which takes that memory once more and holds Python's
    lock meanwhile, so that training would stand still. And its header has three entries in random
    order, where the same tensors should be the same bytes.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank = plan.storage_data["shard_index"] - 1
        for number, items in enumerate(_files(plan.items), start=1):
            data = {i.index.fqn: planner.resolve_data(i) for i in items}
            tensors = {k: t.contiguous() for k, t in data.items() if isinstance(t, Tensor)}
            offsets = {
                i.index.fqn: {SAVED_OFFSETS_KEY: list(i.tensor_data.chunk.offsets)}  # type: ignore[union-attr]
                for i in items
            }
            save_file(
                tensors,
                Path(self.path) / f"rank-{rank:05d}-{number:05d}.safetensors",
                metadata={CUSTOM_METADATA_KEY: json.dumps(offsets)},
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result([])
        return future


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Divides a rank's share into files."""
    file: list[WriteItem] = []
    size = 0
    for item in items:
        data = item.tensor_data
        count = data.chunk.sizes.numel() * data.properties.dtype.itemsize  # type: ignore[union-attr]
        if file and size + count > FILE_SIZE:
            yield file
            file, size = [], 0
        file.append(item)
        size += count
    if file:
        yield file
