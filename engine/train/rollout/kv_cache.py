"""A key-value cache that is allocated once, for a whole response."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's cache, written into a buffer that is allocated at the first token.

    `DynamicLayer` (transformers, `cache_utils.py`) concatenates a longer tensor for each token: a
    full copy per token and, on a CPU, freed blocks of growing sizes that the allocator cannot
    reuse, about 50 % more memory. Pages of the buffer that no response reaches are never touched,
    so they cost no memory.
    """

    def __init__(self, capacity: int) -> None:
        """Allocates nothing yet.

        Args:
            capacity: positions, prompt and response together. A longer sequence fits as well: the
                buffer is as long as the first update needs.
        """
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends positions, (n, heads, new, width) each; returns keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffers is None:
            self._buffers = (
                self._allocate(key_states, past, self.keys, length),
                self._allocate(value_states, past, self.values, length),
            )
        keys, values = (x[: len(key_states), :, :length] for x in self._buffers)
        keys[:, :, past:] = key_states
        values[:, :, past:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def _allocate(self, like: Tensor, past: int, previous: Tensor | None, length: int) -> Tensor:
        """A buffer (n, heads, capacity, width) that starts with the `past` positions there are."""
        count, heads, _, width = like.shape
        buffer = like.new_empty(count, heads, max(self._capacity, length), width)
        if previous is not None and past:
            buffer[:, :, :past] = previous
        return buffer

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row; the next update allocates a new buffer."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows, moved to the front of the same buffer."""
        if self._buffers is None or self.keys is None or self.values is None:
            super().batch_select_indices(indices)
            return
        keys, values = (x[: len(indices), :, : self.get_seq_length()] for x in self._buffers)
        keys.copy_(self.keys[indices])
        values.copy_(self.values[indices])
        self.keys, self.values = keys, values


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache for a model. Sliding-window layers keep the type transformers gives them."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache
