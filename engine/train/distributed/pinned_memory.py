"""Pinned host memory, between which and a GPU copies have the full speed of the bus."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import first_line

log = logging.getLogger("engine")


class PinnedMemory:
    """Allocates pinned memory, or pageable memory once the system has refused it."""

    def __init__(self, contents: str) -> None:
        """Takes what is kept in it, in words, for a warning."""
        self._contents = contents
        self._allowed = True

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor on the host, of the same shape and dtype."""
        shape, dtype = tensor.shape, tensor.dtype
        pinned = self._pinned(lambda: torch.empty(shape, dtype=dtype, pin_memory=True))
        return torch.empty(shape, dtype=dtype) if pinned is None else pinned

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor that is on the host: a pinned copy, or the tensor itself."""
        pinned = self._pinned(tensor.pin_memory)
        return tensor if pinned is None else pinned

    def _pinned(self, allocate: Callable[[], Tensor]) -> Tensor | None:
        if self._allowed:
            try:
                return allocate()
            except RuntimeError as error:  # a container's limit on locked memory, for example
                self._allowed = False
                # Not the error itself: its traceback holds tensors.
                log.warning("%s in pageable memory: %s", self._contents, first_line(error))
        return None
