"""How a model lies on the ranks: whole on each (DDP), or sharded over them (torch's FSDP2).

One rank reads a model's weights and the others receive them: a run of many ranks reads each file
once, and machines without it need no copy.
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from engine.train.distributed.file_backed import back_by_file, drop_pages
from engine.train.distributed.ranks import RankGroup

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")


def place_model(
    module: nn.Module, ranks: RankGroup, strategy: str, compute: torch.dtype = torch.float32
) -> None:
    """Puts a model in its place, in rank 0's state, on every rank.

    Args:
        module: with its weights on rank 0; on the others of the same shape, on the meta device.
        ranks: all ranks of this attempt.
        strategy: `ddp` (whole) or `fsdp`.
        compute: what FSDP gathers the weights in; their shards keep their own dtype.
    """
    if ranks.size == 1:
        module.to(ranks.device)
    elif strategy == "fsdp":
        _shard(module, ranks, compute)
    else:
        module.to(ranks.device) if ranks.is_lead else module.to_empty(device=ranks.device)
        _tie(module)
        for tensor in [*module.parameters(), *module.buffers()]:
            _broadcast(tensor.data, ranks)


def _shard(module: nn.Module, ranks: RankGroup, compute: torch.dtype) -> None:
    """Each block a unit of its own, the rest the root's; rank 0 hands out the shards."""
    read = dict(module.state_dict()) if ranks.is_lead else {}
    buffers = dict(module.named_buffers())
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    if ranks.is_lead:
        module.to("meta")
        _tie(module)
    mesh = _mesh(ranks)
    # Gradients travel and add up in float32, as under DDP: in bfloat16 small ones would be lost.
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute is torch.float32 else compute, reduce_dtype=torch.float32
    )
    head = getattr(module, "value_head", None)
    if head is not None:  # one product a token: kept exact
        fully_shard(head, mesh=mesh)
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    state: dict[str, Tensor] = {}
    for name, target in module.state_dict().items():
        given = read.pop(name, None)
        full = torch.empty(target.shape, dtype=target.dtype, device=ranks.device)
        if given is not None:
            full.copy_(given)
        if isinstance(target, DTensor):
            state[name] = distribute_tensor(full, mesh, target.placements, src_data_rank=0)
        else:
            _broadcast(full, ranks)
            state[name] = full
    module.load_state_dict(state, assign=True)
    _tie(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    for name, buffer in buffers.items():  # those that no state dict holds: rotary frequencies …
        where, _, own = name.rpartition(".")
        if name not in state:
            full = torch.empty(buffer.shape, dtype=buffer.dtype, device=ranks.device)
            if ranks.is_lead:
                full.copy_(buffer)
            _broadcast(full, ranks)
            module.get_submodule(where).register_buffer(own, full, persistent=False)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of the transformers inside, as transformers names what must not be split."""
    names = {n for m in module.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in module.modules() if type(m).__name__ in names]


def _tie(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def _broadcast(tensor: Tensor, ranks: RankGroup) -> None:
    """In place, whatever its strides."""
    content = tensor.contiguous()
    dist.broadcast(content, 0)
    if not ranks.is_lead and content.data_ptr() != tensor.data_ptr():
        tensor.copy_(content)


def _mesh(ranks: RankGroup) -> DeviceMesh:
    return init_device_mesh(ranks.device.type, (ranks.size,))


def learner(module: nn.Module, ranks: RankGroup, strategy: str) -> nn.Module:
    """What the epochs enter: under DDP a wrapper that averages the gradients."""
    if ranks.size == 1 or strategy == "fsdp":
        return module
    with warnings.catch_warnings():
        # `broadcast_buffers` gets another name in torch 2.13, which 2.9 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # nothing in them changes
            gradient_as_bucket_view=True,
            init_sync=False,  # `settle` has done that
        )


@contextmanager
def synchronised(model: nn.Module, *, last: bool) -> Iterator[None]:
    """One micro-batch; DDP averages the gradients over the ranks with the minibatch's last one.

    FSDP2 does with each: gradients that wait are whole ones, of all layers, on every rank.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def materialised(model: Any) -> Iterator[None]:
    """A model is whole and on the device in here, and its forward passes need no other rank.

    A sharded one is gathered once for a rollout rather than once a token; that takes its full size
    in its compute dtype. One that is kept on the host comes over. Ranks may do unequal work inside.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    away = getattr(model, "rests_on_host", None)
    if away is not None:
        model.to(away)
    try:
        yield
    finally:
        if away is not None:
            model.to("cpu")
        drop_pages(model)
        for unit in units:
            unit.reshard()
            # But for the root, the first of them, which the backward pass begins with; `model` may
            # be a view of it.
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)


def offload_between_uses(
    module: nn.Module, ranks: RankGroup, strategy: str, *, on_host: bool
) -> None:
    """A frozen model takes the device's memory only inside :func:`at_hand`.

    Of a GPU's where it is to rest on the host; on a CPU it rests in a file, unless it is sharded.
    """
    if ranks.device.type == "cpu":
        if ranks.size == 1 or strategy != "fsdp":
            back_by_file(module, blocks(module))
    elif on_host:
        module.rests_on_host = ranks.device  # type: ignore[assignment]
        module.to("cpu")


def with_materialised_model(
    function: Callable[Concatenate[M, P], R],
) -> Callable[Concatenate[M, P], R]:
    """For functions whose first argument is a model: it is at hand in them."""

    @wraps(function)
    def inside(model: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with materialised(model):
            return function(model, *args, **kwargs)

    return inside


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor's full content; of a sharded one all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
