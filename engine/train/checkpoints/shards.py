"""Writes and reads the tensors of a checkpoint, distributed over the ranks.

Each rank plans by torch.distributed.checkpoint what it writes and reads, alone: when ranks plan
together, torch sends pickles between them. The files are safetensors, as torch's default format
stores a pickle beside the tensors. Loading a pickle can execute code.
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
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from engine.errors import CheckpointError
from engine.train.checkpoints.folder import read_optimiser
from engine.train.distributed.exchange import fail_together
from engine.train.distributed.sharding import local_tensor, zeros_by_rows
from engine.train.models.adapters.quantised_linear import QuantisedLinear
from engine.train.models.language_model import AnyModel, LanguageModel
from engine.train.ppo.adamw_8bit import SCALE_SUFFIX, block_size, scale_shape

FILE_SIZE = 4 << 30
"""Maximum bytes of tensors per file."""
VALUE = ("value_head.", "value_trunk.")
REFERENCE = "reference/"
AVERAGE = "ema"
"""Folder of the averaged policy's tensors, in any number of shards."""

# Expected for a single rank.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def training_tensors(policy: LanguageModel, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The value function and the optimiser's state by name; not copied.

    The names of the optimiser's state are ``exp_avg/NAME_OF_PARAMETER`` and so on. For a sharded
    policy all tensors except the step counts are DTensors.
    """
    tensors = _value_tensors(policy)  # first, because it reshards gathered parameters
    missing = len(optimiser.state)
    for name, parameter in policy.named_parameters():
        if parameter in optimiser.state:
            state: dict[str, Any] = optimiser.state[parameter]
            tensors |= {f"{part}/{name}": value.detach() for part, value in state.items()}
            missing -= 1
    if missing:
        raise RuntimeError(f"the optimiser has {missing} parameters that the policy does not have")
    # Sorted: the order differs between an optimiser that was loaded and one that has stepped.
    return dict(sorted(tensors.items()))


def optimiser_kind(optimiser: torch.optim.Optimizer) -> str:
    """The optimiser's class and whether it is fused, which determine the rounding of a step."""
    fused = " (fused)" if optimiser.defaults.get("fused") else ""
    return type(optimiser).__name__ + fused


def share(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Selects what this rank writes: its shards, and its share of the replicated tensors.

    Call it before copying to host memory, so that the ranks of a machine together copy each
    replicated tensor once.
    """
    if group is None:
        return tensors
    rank, loads = dist.get_rank(group), [0] * dist.get_world_size(group)
    selected: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            selected[name] = tensor
            continue
        writer = loads.index(min(loads))
        loads[writer] += tensor.nbytes
        if writer == rank:
            selected[name] = tensor
    return selected


def local_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors on this rank, counting only its shards of a DTensor."""
    return sum(local_tensor(tensor).nbytes for tensor in tensors.values())


def save_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes the tensors of all ranks into one folder. All ranks must call it.

    Args:
        folder: an existing folder, the same on all ranks.
        tensors: this rank's tensors on the CPU: shards, or tensors that no other rank passes.
        group: a gloo group of all ranks; None for one rank.

    Raises:
        CheckpointError: any rank failed; raised on all ranks.
    """
    problem: Exception | None = None
    try:
        _write_share(folder, tensors, 0 if group is None else dist.get_rank(group))
    except Exception as error:  # raised on all ranks below
        problem = error
    fail_together(problem, group)


def read_unsharded(folder: Path) -> dict[str, Tensor]:
    """Reads a folder of shards into unsharded tensors on the CPU. Not a collective."""
    stored = _stored_tensors(folder)
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}
    _load(tensors, folder)
    return tensors


def load_training(
    folder: Path,
    policy: LanguageModel,
    optimiser: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> bool:
    """Restores the value function and the optimiser's state bit for bit. All ranks must call it.

    Each rank reads only its own part. The number of ranks and the sharding may differ from those of
    the save. The policy's weights are loaded from ``policy/`` like those of any model.

    Args:
        folder: the folder of the checkpoint.
        policy: the policy, already sharded if it is going to be.
        optimiser: a new optimiser of the policy's parameters.
        group: a gloo group of all ranks; None for one rank.

    Returns:
        Whether the optimiser's state was restored. That of another `train.optimiser`, which a fork
        can choose, is left out, and the optimiser starts anew.

    Raises:
        CheckpointError: the tensors do not match the model, or the same optimiser would round
            differently here.
    """
    kind, ours = read_optimiser(folder), optimiser_kind(optimiser)
    restored = kind.partition(" ")[0] == ours.partition(" ")[0]
    if restored and kind != ours:
        # Fused and unfused AdamW round differently, so a resumed run would not be reproducible.
        raise CheckpointError(
            f"the checkpoint {folder} was written with {kind}, but this machine uses "
            f"{ours}: fork instead of resuming"
        )
    stored = _stored_tensors(folder / "training")
    tensors = _value_tensors(policy)
    _check_value_function(stored, tensors, policy, folder)
    parameters = dict(policy.named_parameters())
    keys = [k for k in stored if not k.startswith((*VALUE, REFERENCE))]
    for key in keys if restored else []:
        part, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"{folder} holds the optimiser's state of another model: {name}")
        tensors[key] = optimiser.state[parameters[name]][part] = _empty_state(
            part, parameters[name], stored[key], optimiser
        )
    if tensors:
        _read_into(tensors, folder, group)
    return restored


def _check_value_function(
    stored: dict[str, TensorStorageMetadata],
    tensors: dict[str, Tensor],
    policy: LanguageModel,
    folder: Path,
) -> None:
    """Checks that a checkpoint's value function has the names and shapes of the policy's.

    A fork can give it another transformer, by `ppo.value_init` or another reward model.
    """
    found = {k: tuple(m.size) for k, m in stored.items() if k.startswith(VALUE)}
    wrong = {k for k, _ in found.items() ^ {(k, tuple(t.shape)) for k, t in tensors.items()}}
    # Checkpoints of earlier versions hold packed weights, too.
    if wrong := {k for k in wrong if not k.startswith(_packed_layers(policy))}:
        raise CheckpointError(
            f"{folder} holds a value function of another architecture ({min(wrong)} differs): keep "
            "ppo.value_init and, if that is reward_model, a reward model of the same architecture"
        )


def _empty_state(
    part: str, parameter: Tensor, stored: TensorStorageMetadata, optimiser: torch.optim.Optimizer
) -> Tensor:
    """A tensor for a part of a parameter's state, sharded like the parameter."""
    dtype = stored.properties.dtype
    if not len(stored.size) and parameter.dim():
        # As in torch's AdamW: the step count is float32 and replicated. Fused AdamW needs it on the
        # device of the parameter.
        fused = optimiser.defaults.get("fused")
        return torch.zeros((), dtype=dtype, device=parameter.device if fused else "cpu")
    if part.endswith(SCALE_SUFFIX) and block_size(parameter.shape):
        return zeros_by_rows(parameter, scale_shape(parameter.shape))
    return torch.zeros_like(parameter, dtype=dtype)


def reference_tensors(reference: AnyModel) -> dict[str, Tensor]:
    """The weights of a reference that is updated, by name; not copied."""
    return {f"{REFERENCE}{n}": p.detach() for n, p in reference.lm.named_parameters()}


def load_reference_weights(
    folder: Path, reference: AnyModel, group: dist.ProcessGroup | None
) -> None:
    """Restores the weights of a reference that was updated before the save. All ranks must call it.

    Args:
        folder: the folder of the checkpoint.
        reference: of the same architecture; changed in place.
        group: a gloo group of all ranks; None for one rank.

    Raises:
        CheckpointError: the tensors are missing or do not match.
    """
    tensors = reference_tensors(reference)
    missing = tensors.keys() - _stored_tensors(folder / "training").keys()
    if missing:
        raise CheckpointError(f"{folder} does not hold the reference's weights: {min(missing)}")
    _read_into(tensors, folder, group)


def has_average(folder: Path) -> bool:
    """Whether a checkpoint has an averaged policy."""
    return (folder / AVERAGE).is_dir()


def load_average(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Restores an averaged policy bit for bit. All ranks must call it.

    Args:
        folder: the folder of the checkpoint; it has an average.
        tensors: the average to overwrite, by name.
        group: a gloo group of all ranks; None for one rank.

    Raises:
        CheckpointError: the tensors are those of another model.
    """
    if wrong := _stored_tensors(folder / AVERAGE).keys() ^ tensors.keys():
        raise CheckpointError(f"{folder} holds the average of another model: {min(wrong)}")
    _read_into(tensors, folder, group, AVERAGE)


def _read_into(
    tensors: dict[str, Tensor],
    folder: Path,
    group: dist.ProcessGroup | None,
    part: str = "training",
) -> None:
    """Overwrites tensors with those of a checkpoint's part, by name. Raises CheckpointError."""
    problem: BaseException | None = None
    try:
        _load(tensors, folder / part)
    except CheckpointException as error:
        problem, _ = error.failures[0]
    try:
        fail_together(problem, group)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error


def _stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Reads shapes and dtypes of the tensors in a folder from the safetensors headers."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {k: m for k, m in found.items() if isinstance(m, TensorStorageMetadata)}


def _value_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The value function, without frozen weights: those are loaded from `model.policy`."""
    tensors = policy.state_dict()
    frozen = {k for k, p in policy.named_parameters() if not p.requires_grad}
    packed = _packed_layers(policy)
    return {
        k: v
        for k, v in tensors.items()
        if k.startswith(VALUE) and k not in frozen and not k.startswith(packed)
    }


def _packed_layers(policy: nn.Module) -> tuple[str, ...]:
    """What the names of weights in 4 bits begin with."""
    return tuple(f"{n}." for n, m in policy.named_modules() if isinstance(m, QuantisedLinear))


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads this rank's part of a folder of shards. Raises CheckpointException.

    `no_dist`, because torch's planning between ranks exchanges pickles. It is not needed: each rank
    reads all headers and finds what it needs.
    """
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _write_share(folder: Path, tensors: dict[str, Tensor], rank: int) -> None:
    """Writes this rank's tensors in the layout of torch's writer of safetensors.

    torch's `save` plans on rank 0, with pickles, who writes what; here :func:`share` has decided
    that already. Its writer serialises the whole file in memory, which doubles the memory and holds
    the GIL, so that training stops meanwhile, and it writes three entries of the header in random
    order, whereas here the same tensors produce the same bytes.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors)
    items = [i for i in planner.create_local_plan().items if _count(i)]
    for number, part in enumerate(_files(items), start=1):
        data = {i.index.fqn: planner.resolve_data(i) for i in part}
        offsets = {
            i.index.fqn: {SAVED_OFFSETS_KEY: list(i.tensor_data.chunk.offsets)}  # type: ignore[union-attr]  # tensors have data
            for i in part
        }
        save_file(
            {k: t.contiguous() for k, t in data.items() if isinstance(t, Tensor)},
            folder / f"rank-{rank:05d}-{number:05d}.safetensors",
            metadata={CUSTOM_METADATA_KEY: json.dumps(offsets)},
        )


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Divides a rank's share into files of at most :data:`FILE_SIZE` bytes of tensors."""
    file: list[WriteItem] = []
    size = 0
    for item in items:
        count = _count(item) * item.tensor_data.properties.dtype.itemsize  # type: ignore[union-attr]  # tensors have data
        if file and size + count > FILE_SIZE:
            yield file
            file, size = [], 0
        file.append(item)
        size += count
    if file:
        yield file


def _count(item: WriteItem) -> int:
    """Numbers in a shard: none on a rank beyond the rows of a small tensor."""
    return item.tensor_data.chunk.sizes.numel()  # type: ignore[union-attr]  # tensors have data
