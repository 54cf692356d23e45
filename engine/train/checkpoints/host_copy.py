"""Copies tensors to host memory, into pinned buffers that are reused for GPU tensors."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.train.distributed.pinned_memory import PinnedMemory
from engine.train.distributed.sharding import local_tensor


class HostCopies:
    """Copies named tensors to host memory; call :meth:`copy` once per save.

    Buffers for GPU tensors are pinned and kept between calls, because pinned memory is slow to
    allocate; a call overwrites the previous call's copies. Tensors on the CPU are cloned, so their
    memory is freed when the save ends.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}
        self._host = PinnedMemory("checkpoints are copied")

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors, by name; a DTensor's copy is a DTensor with its shard on the CPU.

        Returns once all copies are complete.
        """
        copies: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors.items():
            local = local_tensor(tensor)
            if local.device.type == "cpu":
                host = local.detach().clone(memory_format=torch.contiguous_format)
            else:
                devices.add(local.device)
                host = self._buffer(name, local)
                host.copy_(local.detach(), non_blocking=True)
            copies[name] = shard_like(tensor, host)
        for device in devices:
            torch.accelerator.synchronize(device)
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._pinned.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._host.empty_like(like)
            self._pinned[name] = buffer
        return buffer


def shard_like(tensor: Tensor, local: Tensor) -> Tensor:
    """Wraps `local` as the shard of a DTensor like `tensor`; unchanged if `tensor` is not one.

    `DTensor.from_local` would move a CPU shard to the mesh's GPU; the protocol of wrapper
    subclasses (torch.utils._python_dispatch.is_traceable_wrapper_subclass) leaves it on the CPU.
    """
    if not isinstance(tensor, DTensor):
        return local
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}  # the shard; in some versions the mesh
    parts = {name: local if isinstance(part, Tensor) else part for name, part in parts.items()}
    return DTensor.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
