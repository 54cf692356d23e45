"""The key-value cache of the slots."""

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache

from engine.train.models.language_model import AnyModel
from engine.train.rollout.native.decoding_attention import DECODING_ATTENTION
from engine.train.rollout.native.kv_cache import (
    PreallocatedLayer,
    full_attention_layers,
    preallocated_cache,
    select_rows,
)
from engine.train.rollout.native.schedule import Schedule

READ_LENGTHS = 4
"""With fixed shapes, the number of read lengths of the cache: its first quarter, half, ..."""
ALIGNMENT = 16
"""Lengths are multiples of this; otherwise CUDA's attention kernels would copy the mask to pad
it."""


class SlotCache:
    """A cache with a row for each slot, in which all write their next token at the same position.

    When a slot is filled, its prompt ends just before that position; anything before the prompt
    belongs to an earlier response and is masked. So to the model, of any architecture, this looks
    like left padding.
    """

    def __init__(
        self,
        model: AnyModel,
        prompt_width: int,
        room: int,
        schedule: Schedule,
        device: torch.device,
    ) -> None:
        """Allocates nothing yet.

        Args:
            model: what the cache is for.
            prompt_width: positions of a batch of prompts.
            room: positions after them.
            schedule: says whether shapes should be fixed.
            device: the model's.
        """
        self._config, self._prompt_width = model.lm.config, prompt_width
        self.capacity = prompt_width + room
        cache = preallocated_cache(self._config, self.capacity)
        self.can_refill = bool(full_attention_layers(cache))
        """Whether single slots can be filled, while the others keep what they have."""
        self.fixed_shapes = schedule.fixed_shapes and self.can_refill and takes_any_mask(model)
        self._read_unit = self.capacity
        if self.fixed_shapes:
            lengths = max(1, min(READ_LENGTHS, self.capacity // schedule.read_step))
            unit = lengths * ALIGNMENT
            self.capacity = -(-self.capacity // unit) * unit
            self._read_unit = self.capacity // lengths
        self.length = 0
        """Number of written positions, where the next token is written."""
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """The same on the device; with fixed shapes, whoever writes a token adds 1."""
        self.read_length = self.capacity
        """With fixed shapes, number of positions that are read."""
        self._positions = torch.arange(self.capacity, device=device)
        self.model_cache = DynamicCache(config=self._config)
        """What the model gets."""

    def start(self) -> None:
        """Empties the cache; the prompts are the first to be written, by the model."""
        position = self.position if self.fixed_shapes else None
        self.model_cache = preallocated_cache(self._config, self.capacity, position)
        self.read_length = self.capacity
        self.length = self._prompt_width
        self.position.fill_(self.length)

    def cache_of_prompts(self) -> DynamicCache:
        """An empty cache for the prompts that :meth:`refill` takes."""
        return preallocated_cache(self._config, self._prompt_width)

    def refill(self, slots: Tensor, prompts: DynamicCache) -> None:
        """Overwrites the last positions of some slots with prompts."""
        theirs = full_attention_layers(prompts)
        for mine, other in zip(self._layers_with_lengths(), theirs, strict=True):
            mine.overwrite_prompts(slots, other)

    def set_read_length(self) -> None:
        """Chooses how many positions the next token reads, with fixed shapes."""
        length = (self.length // self._read_unit + 1) * self._read_unit
        if self.fixed_shapes and length != self.read_length:
            self.read_length = length
            for layer in full_attention_layers(self.model_cache):
                layer.read_length = length

    def attended(self, start: Tensor) -> Tensor:
        """The attention mask of the next token, whose own position is the last one attended to.

        Args:
            start: where each slot's prompt starts; (n,).

        Returns:
            (n, read length) bool with fixed shapes, otherwise (n, length + 1) int64.
        """
        if self.fixed_shapes:
            positions = self._positions[: self.read_length]
            return (positions >= start[:, None]) & (positions <= self.position)
        return (self._positions[: self.length + 1] >= start[:, None]).long()

    def keep(self, slots: Tensor) -> None:
        """Keeps some slots, in the given order."""
        self._layers_with_lengths()
        select_rows(self.model_cache, slots)

    def drop_first(self, first: int) -> int:
        """Moves positions to the front, from `first` on, so that there is room.

        As many stay as prompts that refill slots have. Returns how far the positions have moved.
        """
        count = min(first, self.length - self._prompt_width)
        for layer in self._layers_with_lengths():
            layer.drop_first(count)
        self.length -= count
        self.position.sub_(count)
        return count

    def _layers_with_lengths(self) -> list[PreallocatedLayer]:
        """The layers with the number of written positions, as needed before rows are moved."""
        layers = full_attention_layers(self.model_cache)
        for layer in layers:
            layer.set_length(self.length)
        return layers


def takes_any_mask(model: AnyModel) -> bool:
    """Whether a model accepts positions, and a custom mask in place of transformers' own."""
    config = model.lm.config
    return (
        "position_ids" in inspect.signature(model.lm.forward).parameters
        and getattr(config, "_attn_implementation", None) in ("sdpa", DECODING_ATTENTION)
        and not getattr(config, "alibi", False)
    )
