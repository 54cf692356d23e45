"""Places models on the ranks: replicated (DDP) or sharded (torch's FSDP2).

To replicate a model, rank 0 reads its weights, one tensor at a time, to the device and broadcasts
them. To shard it, each rank reads its own shards (:mod:`engine.train.distributed.stored_tensor`),
so that no rank holds the whole model; a rank that does not have the files receives its shards from
rank 0. Each byte is read once, and the other machines need no copy of the files.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from engine.train.distributed.file_backed import back_by_file, drop_pages
from engine.train.distributed.pinned_memory import PinnedMemory
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.stored_tensor import read_stored
from engine.train.distributed.weight_source import WeightSource

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")

# An operation in place on a view would drop FSDP's hook on it, so torch warns of outputs that are
# views. Logits are, and values before they are copied; no forward pass changes them in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def place_model(
    module: nn.Module,
    ranks: RankGroup,
    strategy: str,
    compute: torch.dtype = torch.float32,
    *,
    frozen: bool = False,
    on_host: bool = False,
) -> None:
    """Moves a model to the device, or shards it, and gives every rank its weights.

    Changes `module` in place. All ranks must call it.

    A frozen model on a CPU is mapped from a file (:func:`back_by_file`), so that it takes memory
    only inside :func:`materialised`; one that is sharded stays, as a rank holds its shards only.

    Args:
        module: the model, with its weights on rank 0 and on the meta device on the other ranks.
            Some or all may be on the meta device on rank 0 too, and marked as stored.
        ranks: all ranks of this attempt.
        strategy: `ddp` (replicated) or `fsdp`.
        compute: dtype in which FSDP gathers the weights; the shards keep their own dtype.
        frozen: whether the model is never trained.
        on_host: keep a frozen model in host memory, outside :func:`materialised`.

    Raises:
        OSError: a file of the weights cannot be read.
    """
    if ranks.size > 1 and strategy == "fsdp":
        _shard(module, ranks, compute, on_host=on_host)
        return
    on_cpu = ranks.device.type == "cpu"
    if not ranks.is_lead:
        module.to_empty(device=ranks.device)
        _tie_weights(module)
    if frozen and on_cpu:
        back_by_file(module, blocks(module))
    if ranks.is_lead:
        read_stored(module, ranks.device)
        if not on_cpu:  # accelerate numbers CPUs, and to `cpu:0` everything would be copied
            module.to(ranks.device)
    if ranks.size > 1:
        _tie_weights(module)
        for tensor in [*module.parameters(), *module.buffers()]:
            _broadcast(tensor.data, ranks)
            drop_pages(module)
    if frozen and on_host and not on_cpu:
        module.to("cpu")
        module.host_weights = HostWeights(module, ranks.device)  # type: ignore[assignment]  # an attribute of our own


def _shard(
    module: nn.Module, ranks: RankGroup, compute: torch.dtype, *, on_host: bool = False
) -> None:
    """Shards each block as an FSDP unit and the rest as the root, and fills in the weights."""
    source = WeightSource(module, ranks)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    if ranks.is_lead:
        module.to("meta")
        _tie_weights(module)
    mesh = _mesh(ranks)
    # Gradients are reduced in float32, as under DDP: in bfloat16 small ones would be rounded away.
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute is torch.float32 else compute, reduce_dtype=torch.float32
    )
    on_host = on_host and ranks.device.type != "cpu"
    # Pinned memory is limited in many containers, and weights that do not change need it least.
    offload = CPUOffloadPolicy(pin_memory=False) if on_host else OffloadPolicy()
    head = getattr(module, "value_head", None)
    if head is not None:  # one product per token: computed in float32
        fully_shard(head, mesh=mesh)
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    state = source.state_dict(module, on_host=on_host)
    module.load_state_dict(state, assign=True)
    _tie_weights(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    for name, buffer in source.buffers(state).items():
        parent, _, attribute = name.rpartition(".")
        module.get_submodule(parent).register_buffer(attribute, buffer, persistent=False)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model: the classes in transformers' `_no_split_modules`."""
    names = {n for m in module.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in module.modules() if type(m).__name__ in names]


def _tie_weights(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def _broadcast(tensor: Tensor, ranks: RankGroup) -> None:
    """Broadcasts rank 0's tensor in place; the tensor need not be contiguous."""
    content = tensor.contiguous()
    dist.broadcast(content, 0)
    if not ranks.is_lead and content.data_ptr() != tensor.data_ptr():
        tensor.copy_(content)


def _mesh(ranks: RankGroup) -> DeviceMesh:
    return init_device_mesh(ranks.device.type, (ranks.size,))


def learner(module: nn.Module, ranks: RankGroup, strategy: str) -> nn.Module:
    """The module for training passes: the policy, wrapped in DDP where gradients are averaged."""
    if ranks.size == 1 or strategy == "fsdp":
        return module
    with warnings.catch_warnings():
        # torch 2.13 renames `broadcast_buffers`; torch 2.9 does not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # buffers are constant
            gradient_as_bucket_view=True,
            init_sync=False,  # `place_model` has synchronised the weights
        )


@contextmanager
def synchronised(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Context for a micro-batch: DDP averages the gradients only in the last of a minibatch.

    FSDP2 reduces the gradients of every micro-batch: postponing it would keep unsharded gradients
    of all layers on every rank.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def materialised(model: Any) -> Iterator[None]:
    """Context in which a model is unsharded and on the device.

    Forward passes inside need no communication, so ranks may do unequal amounts of work. A sharded
    model is gathered once for a whole rollout instead of once per token; this takes its full size
    in the compute dtype. A model that is offloaded to the host is moved to the device. All ranks
    must enter and leave the context.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    host: HostWeights | None = getattr(model, "host_weights", None)
    try:
        # Inside: what was copied before memory ran out is to be freed, too.
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        if host is not None:
            host.copy_to_device()
        yield
    finally:
        if host is not None:
            host.drop_copies()
        drop_pages(model)
        for unit in units:
            unit.reshard()
            # Not for the root, the first unit: the backward pass begins with it. `model` may be an
            # AdapterFreePolicy, so the root is not `model` itself.
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)


class HostWeights:
    """The weights of a frozen model, which stay in host memory while the device has a copy.

    They do not change, so that nothing is copied back, and no memory is allocated for it.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Keeps the weights of a module that is on the host, for use on a device."""
        self._device = device
        tensors = [*module.parameters(), *module.buffers()]  # tied ones once
        host = PinnedMemory("frozen weights are kept")
        self._on_host = [(tensor, host.moved(tensor.data)) for tensor in tensors]
        for tensor, data in self._on_host:
            tensor.data = data

    def copy_to_device(self) -> None:
        """Makes the module compute with copies on the device."""
        for tensor, data in self._on_host:
            tensor.data = data.to(self._device, non_blocking=True)

    def drop_copies(self) -> None:
        """Makes the module compute with the weights on the host, and frees the copies."""
        for tensor, data in self._on_host:
            tensor.data = data


def with_materialised_model(
    function: Callable[Concatenate[M, P], R],
) -> Callable[Concatenate[M, P], R]:
    """Decorator: calls a function inside :func:`materialised` of its first argument, a model."""

    @wraps(function)
    def wrapper(model: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with materialised(model):
            return function(model, *args, **kwargs)

    return wrapper


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor; all ranks must call it. Returns any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, without copying; any other tensor unchanged."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def zeros_by_rows(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Float32 zeros for a tensor with as many rows, sharded by rows like it if it is sharded."""
    if not isinstance(like, DTensor):
        return torch.zeros(shape, device=like.device)
    return sharded_zeros(shape, device_mesh=like.device_mesh, placements=like.placements)
