"""Keeps the inputs of layers on the host until the backward pass (`parallel.activations`).

With activation checkpointing they are what a model keeps for each layer. The copies are in the
order of the GPU's other work, so the host does not wait for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.distributed.pinned_memory import PinnedMemory


@dataclass(frozen=True)
class OnHost:
    """A tensor on the host, and an empty one on the device that it came from."""

    copy: Tensor
    there: Tensor


class OffloadedActivations:
    """Moves what autograd keeps of a model's hidden states to the host."""

    def __init__(self, width: int) -> None:
        """Takes the size of the hidden states, H: tensors (n, L, H) are moved."""
        self._width = width
        self._host = PinnedMemory("activations are kept")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager for a forward pass. Does nothing on a CPU, or without gradients."""
        with torch.autograd.graph.saved_tensors_hooks(self._to_host, _to_device):
            yield

    def _to_host(self, tensor: Tensor) -> Tensor | OnHost:
        on_cpu = tensor.device.type == "cpu"
        if on_cpu or tensor.dim() != 3 or tensor.shape[-1] != self._width:
            return tensor
        copy = self._host.empty_like(tensor)
        copy.copy_(tensor.detach(), non_blocking=True)
        return OnHost(copy, tensor.new_empty(0))


def _to_device(kept: Tensor | OnHost) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tensor = kept.there.new_empty(kept.copy.shape)
    tensor.copy_(kept.copy, non_blocking=True)
    return tensor
