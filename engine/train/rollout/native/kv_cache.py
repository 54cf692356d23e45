"""A key-value cache that is allocated once for a whole response."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


@dataclass
class FixedLayer:
    """One layer's fixed-shape cache, as passed to a compiled layer."""

    keys: Tensor
    """(n, heads, positions to attend to, width)."""
    values: Tensor
    """The same."""
    cache_position: Tensor
    """(1,) int64: the position at which the token is written."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes one token's keys and values, (n, heads, 1, width) each; returns all of them."""
        self.keys.index_copy_(2, self.cache_position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.cache_position, value_states.to(self.values.dtype))
        return self.keys, self.values


class PreallocatedLayer(DynamicLayer):
    """One layer's cache, written into a buffer that is allocated at the first token.

    `DynamicLayer` (transformers, `cache_utils.py`) concatenates a longer tensor for each token.
    That is a full copy per token and, on a CPU, leaves freed blocks of growing sizes that the
    allocator cannot reuse: about 50 % more memory. Buffer pages that no response reaches are never
    touched, so they cost no memory. Of the base-class methods that change the rows or positions,
    only :meth:`batch_select_indices` keeps the buffer up to date.
    """

    def __init__(self, capacity: int, cache_position: Tensor | None = None) -> None:
        """Allocates nothing yet.

        Args:
            capacity: number of positions, prompt plus response. If the first update is longer, the
                buffer is allocated for its length.
            cache_position: (1,) int64 on the device. If given, shapes are fixed after the prompt:
                each token is written at this position, which the caller advances, and
                :attr:`read_length` positions are returned. Positions not yet written are 0.
        """
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._cache_position = cache_position
        self.read_length = capacity
        """With fixed shapes, the number of positions to attend to."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends positions, (n, heads, new, width) each; returns keys and values so far.

        Keys are stored in the dtype of the values: under autocast, rotary embeddings return float32
        keys, which attention would otherwise cast back for each token.
        """
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffers is None:
            self._buffers = (
                self._allocate(key_states, past, self.keys, length),
                self._allocate(value_states, past, self.values, length),
            )
        if self._cache_position is not None and past:
            keys, values = (x[: len(key_states)] for x in self._buffers)
            keys.index_copy_(2, self._cache_position, key_states)
            values.index_copy_(2, self._cache_position, value_states)
            return keys[:, :, : self.read_length], values[:, :, : self.read_length]
        keys, values = (x[: len(key_states), :, :length] for x in self._buffers)
        keys[:, :, past:] = key_states
        values[:, :, past:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def fixed(self) -> FixedLayer | None:
        """Returns the layer's fixed-shape cache; None before the prompt or without fixed shapes."""
        if self._cache_position is None or self._buffers is None or self.keys is None:
            return None
        keys, values = (x[: len(self.keys), :, : self.read_length] for x in self._buffers)
        return FixedLayer(keys, values, self._cache_position)

    def _allocate(self, like: Tensor, past: int, previous: Tensor | None, length: int) -> Tensor:
        """Allocates (n, heads, capacity, width), starting with the `past` existing positions."""
        count, heads, _, width = like.shape
        shape = (count, heads, max(self._capacity, length), width)
        # Masked positions must be finite: 0 times uninitialised memory may be NaN.
        buffer = like.new_empty(shape) if self._cache_position is None else like.new_zeros(shape)
        if previous is not None and past:
            buffer[:, :, :past] = previous
        return buffer

    def set_length(self, length: int) -> None:
        """Sets the number of written positions, which with fixed shapes only the caller knows."""
        if self._buffers is not None and self.keys is not None:
            rows = len(self.keys)
            self.keys, self.values = (x[:rows, :, :length] for x in self._buffers)

    def overwrite_prompts(self, rows: Tensor, prompts: DynamicLayer) -> None:
        """Overwrites the last positions of some rows with a layer that holds other prompts."""
        for mine, theirs in ((self.keys, prompts.keys), (self.values, prompts.values)):
            if mine is not None and theirs is not None:
                mine[rows, :, mine.shape[2] - theirs.shape[2] :] = theirs

    def drop_first(self, count: int) -> None:
        """Drops the first positions and moves the others to the front of the same buffer."""
        length = self.get_seq_length() - count
        for buffer in self._buffers or ():
            buffer[:, :, :length] = buffer[:, :, count : count + length].clone()
        self.set_length(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows, moved to the front of the same buffer.

        If there are more indices than rows, the next update allocates a new buffer.
        """
        if self._buffers is None or self.keys is None or self.values is None:
            super().batch_select_indices(indices)
            return
        if len(indices) > len(self._buffers[0]):
            super().batch_select_indices(indices)
            self._buffers = None
            return
        keys, values = (x[: len(indices), :, : self.get_seq_length()] for x in self._buffers)
        keys.copy_(self.keys[indices])
        values.copy_(self.values[indices])
        self.keys, self.values = keys, values


def preallocated_cache(
    config: PretrainedConfig, capacity: int, cache_position: Tensor | None = None
) -> DynamicCache:
    """Creates an empty cache for a model. Sliding-window layers keep transformers' own type.

    Args:
        config: the model's.
        capacity: number of positions, prompt plus response.
        cache_position: see :class:`PreallocatedLayer`.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity, cache_position) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def full_attention_layers(cache: DynamicCache) -> list[PreallocatedLayer]:
    """Returns a cache's layers; none if any uses a sliding window or another kind of state."""
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    return layers if len(layers) == len(cache.layers) else []


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps some rows of a cache, in the given order; rows are (n,) int64 on its device."""
    layers: list[Any] = cache.layers  # no base class declares both methods
    for layer in layers:
        # `batch_select_indices` leaves out the states of state-space and linear attention layers.
        if hasattr(layer, "recurrent_states"):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)
