"""The weights that a model receives when it is sharded: read from files, or sent by rank 0."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.stored_tensor import StoredTensor, stored_of, temporary_tensor


class WeightSource:
    """The locations of a model's parameters and buffers, recorded before it is sharded.

    At any time a rank holds only the shards it has created so far and one more tensor.
    """

    def __init__(self, module: nn.Module, ranks: RankGroup) -> None:
        """Records the weights' locations. On rank 0, also keeps weights that the model holds."""
        self._ranks = ranks
        held = module.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(held.items())}
        self._tied = {n: first[id(t)] for n, t in held.items() if first[id(t)] != n}
        self._stored = {n: s for n, t in held.items() if (s := stored_of(t)) is not None}
        values = {n: t.detach() for n, t in held.items() if n not in self._stored}
        self._values: dict[str, Tensor] = values if ranks.is_lead else {}
        self._buffers = dict(module.named_buffers())

    def state_dict(self, module: nn.Module, *, on_host: bool = False) -> dict[str, Tensor]:
        """The weights of the sharded model, on the device of this rank. All ranks must call it.

        Args:
            module: the model, sharded and on the meta device.
            on_host: move the shards to host memory.

        Raises:
            OSError: a file cannot be read.
        """
        state: dict[str, Tensor] = {}
        for name, target in module.state_dict().items():
            first = self._tied.get(name)
            if first is not None:  # not a second time in memory
                state[name] = state[first]
                continue
            state[name] = self._tensor(name, target)
            if on_host and isinstance(target, DTensor):
                state[name] = state[name].to("cpu")
        return state

    def buffers(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The buffers that are not in the state dict: rotary frequencies, for example."""
        return {
            name: self._broadcast(name, buffer, buffer if self._ranks.is_lead else None)
            for name, buffer in self._buffers.items()
            if name not in state
        }

    def _tensor(self, name: str, target: Tensor) -> Tensor:
        stored, value = self._stored.get(name), self._values.pop(name, None)
        if not isinstance(target, DTensor):
            return self._broadcast(name, target, value)
        if stored is not None and stored.on_every_rank:
            return self._read_shard(stored, target)
        full = self._full(target, value)
        if stored is not None and self._ranks.is_lead:
            stored.read_into(full)
        return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=0)

    def _read_shard(self, stored: StoredTensor, target: DTensor) -> DTensor:
        """Reads this rank's rows of a tensor that is sharded by rows, as FSDP2 does."""
        rank, size = self._ranks.rank, self._ranks.size
        count = target.to_local().shape[0]
        first = min(rank * -(-target.shape[0] // size), target.shape[0] - count)
        local, device = stored.read(first, count, target.dtype), self._ranks.device
        if device.type != "cpu":  # accelerate numbers CPUs, and to `cpu:1` a tensor is copied
            local = local.to(device)
        return DTensor.from_local(
            local, target.device_mesh, target.placements, run_check=False,
            shape=target.shape, stride=target.stride(),
        )  # fmt: skip

    def _full(self, target: Tensor, value: Tensor | None) -> Tensor:
        """The value on the device; on ranks without it, memory that is not yet written to."""
        if self._ranks.device.type == "cpu":
            full = temporary_tensor(target.shape, target.dtype)
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=self._ranks.device)
        return full if value is None else full.copy_(value)

    def _broadcast(self, name: str, target: Tensor, value: Tensor | None) -> Tensor:
        full = torch.empty(target.shape, dtype=target.dtype, device=self._ranks.device)
        if value is not None:
            full.copy_(value)
        if name in self._stored and self._ranks.is_lead:
            self._stored[name].read_into(full)
        dist.broadcast(full, 0)
        return full
