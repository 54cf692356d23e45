"""A key-value cache with room for a whole answer from the start."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's cache, written into memory that is there already.

    The layer it takes the place of (transformers, cache_utils.py) makes a longer tensor for each
    token: a copy of everything each time, and on a CPU holes of growing sizes that the allocator
    cannot fill, half as much memory again. Pages that no answer reaches are never touched.
    """

    def __init__(self, room: int) -> None:
        """`room`: positions, of prompt and answer together."""
        super().__init__()
        self._room = room
        self._whole: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds positions, (n, heads, new, width) each, and returns those there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._whole is None:
            self._whole = (self._roomy(key_states, past, self.keys, length),
                           self._roomy(value_states, past, self.values, length))  # fmt: skip
        keys, values = (x[: len(key_states), :, :length] for x in self._whole)
        keys[:, :, past:] = key_states
        values[:, :, past:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def _roomy(self, like: Tensor, past: int, before: Tensor | None, length: int) -> Tensor:
        count, heads, _, width = like.shape
        whole = like.new_empty(count, heads, max(self._room, length), width)
        if before is not None and past:
            whole[:, :, :past] = before
        return whole

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times; in memory of its own."""
        super().batch_repeat_interleave(repeats)
        self._whole = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, moved to the front of the memory they lie in."""
        if self._whole is None or self.keys is None or self.values is None:
            super().batch_select_indices(indices)
            return
        keys, values = (x[: len(indices), :, : self.get_seq_length()] for x in self._whole)
        keys.copy_(self.keys[indices])
        values.copy_(self.values[indices])
        self.keys, self.values = keys, values


def preallocated_cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """An empty cache for a model; layers that look back over a window only stay as they come."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
