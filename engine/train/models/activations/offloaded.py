"""Keeps the inputs of layers on the host until the backward pass (`parallel.activations`).

With activation checkpointing they are what a model keeps for each layer. The copies are in the
order of the GPU's other work, so the host does not wait for them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import first_line

log = logging.getLogger("engine")


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
        self._pins = True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager for a forward pass. Does nothing on a CPU, or without gradients."""
        with torch.autograd.graph.saved_tensors_hooks(self._to_host, _to_device):
            yield

    def _to_host(self, tensor: Tensor) -> Tensor | OnHost:
        on_cpu = tensor.device.type == "cpu"
        if on_cpu or tensor.dim() != 3 or tensor.shape[-1] != self._width:
            return tensor
        copy = self._empty(tensor)
        copy.copy_(tensor.detach(), non_blocking=True)
        return OnHost(copy, tensor.new_empty(0))

    def _empty(self, like: Tensor) -> Tensor:
        """Host memory, pinned: a GPU writes to it at the full speed of its bus."""
        if self._pins:
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:  # a container's limit on locked memory, for example
                self._pins = False
                # Not the error itself: its traceback holds the tensors of the forward pass.
                log.warning("activations are kept in pageable memory: %s", first_line(error))
        return torch.empty(like.shape, dtype=like.dtype)


def _to_device(kept: Tensor | OnHost) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tensor = kept.there.new_empty(kept.copy.shape)
    tensor.copy_(kept.copy, non_blocking=True)
    return tensor
