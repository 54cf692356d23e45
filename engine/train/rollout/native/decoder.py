"""The decoding loop: assigns prompts to slots, which generate token by token."""

import inspect
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from engine.progress import ReportProgress
from engine.train.models.language_model import AnyModel
from engine.train.rollout.native.cuda_graph import GraphedFunction, can_capture
from engine.train.rollout.native.decoding_attention import DECODING_ATTENTION
from engine.train.rollout.native.kv_cache import (
    PreallocatedLayer,
    full_attention_layers,
    preallocated_cache,
    select_rows,
)
from engine.train.rollout.native.slots import Responses, Slots
from engine.train.rollout.rollout import OnEnded, left_mask
from engine.train.rollout.stop_criteria import StopCriteria

READ_LENGTHS = 4
"""With fixed shapes, the number of read lengths of the cache: its first quarter, half, ..."""
ALIGNMENT = 16
"""Lengths are multiples of this; otherwise CUDA's attention kernels would copy the mask to pad
it."""
MIN_SLOTS = 8
"""With fixed shapes, the number of slots is halved down to this as responses end."""
REFILL_SHARE = 8
"""Ended slots are refilled once they are an eighth of all, since single prompts are inefficient."""


@dataclass(frozen=True)
class Schedule:
    """How often the host reads sampled tokens from the device, and which shapes are computed."""

    check_every: int
    """Tokens between two checks for ended responses. Until the next check, their slots compute
    tokens that are discarded."""
    fixed_shapes: bool
    """Whether only a few read lengths of the cache and a few numbers of slots occur, so that few
    CUDA graphs cover all tokens. Otherwise ended slots are dropped at each check."""
    read_step: int = 256
    """With fixed shapes, the smallest difference between two read lengths of the cache. Each read
    length costs an extra pass over one token to capture a graph: 24 to 39 ms for 24 layers. Reading
    384 positions of 64 responses instead of 192 takes a layer 1 µs (both on an H200)."""


EXACT = Schedule(check_every=1, fixed_shapes=False)
"""For a CPU, which is synchronous anyway and where each row and position costs time."""
GRAPHED = Schedule(check_every=16, fixed_shapes=True)
"""For a GPU, where launches and checks cost more than unneeded rows and positions."""


def schedule_for(device: torch.device) -> Schedule:
    """Returns the schedule for a device."""
    return GRAPHED if device.type == "cuda" else EXACT


@dataclass
class HostSlot:
    """The host's view of a slot and its response at the last check."""

    row: int
    """Index of the response."""
    start: int
    """Where its prompt starts in the cache."""
    token_count: int = 1
    """Number of sampled tokens."""
    searched: int = 0
    """Number of tokens already searched for stop strings."""
    ended: bool = False


class Decoder:
    """Generates all responses with a model; call :meth:`run` once, inside the model's autocast.

    All slots write their next token at the same position of the cache. When a slot is filled, its
    prompt ends just before that position; anything before the prompt belongs to an earlier response
    and is masked. So to the model, of any architecture, this looks like left padding.
    """

    def __init__(
        self,
        model: AnyModel,
        responses: Responses,
        stop_criteria: StopCriteria,
        schedule: Schedule,
        report: ReportProgress,
        *,
        per_prompt: int,
        at_once: int | None,
        compiled: set[Hashable] | None,
        on_ended: OnEnded | None,
    ) -> None:
        """Allocates no cache yet.

        Args:
            model: in evaluation mode.
            responses: B prompts, and room for the sampled tokens.
            stop_criteria: when a response ends.
            schedule: see :func:`schedule_for`.
            report: see :meth:`run`.
            per_prompt: number of adjacent rows with the same prompt, which is processed once.
            at_once: number of slots; default: B.
            compiled: shapes that the model's layers have been compiled for; None if they are not.
                See :class:`~engine.train.rollout.native.compiled_layers.CompiledLayers`.
            on_ended: called after the check at which a response has ended.
        """
        self._model, self._responses, self._stop_criteria = model, responses, stop_criteria
        self._report, self._on_ended = report, on_ended
        self._per_prompt = per_prompt
        self._device = responses.ids.device
        self._slot_count = min(at_once or responses.count, responses.count)
        self._prompt_width = responses.batch.ids.shape[1]
        self._prompt_lengths = responses.batch.lengths.tolist()
        room = responses.limit
        if self._slot_count < responses.count:  # so that positions are not moved at every check
            room += max(responses.limit // 2, schedule.check_every)
        self._capacity = self._prompt_width + room
        layers = full_attention_layers(preallocated_cache(model.lm.config, self._capacity))
        self._can_refill = layers is not None
        self._fixed_shapes = schedule.fixed_shapes and self._can_refill and takes_any_mask(model)
        self._read_unit = self._capacity
        if self._fixed_shapes:
            lengths = max(1, min(READ_LENGTHS, self._capacity // schedule.read_step))
            unit = lengths * ALIGNMENT
            self._capacity = -(-self._capacity // unit) * unit
            self._read_unit = self._capacity // lengths
        self._positions = torch.arange(self._capacity, device=self._device)
        self._cache_position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._check_every = schedule.check_every
        self._step = GraphedFunction(
            self._fixed_step if self._fixed_shapes else self._exact_step,
            usable=self._fixed_shapes and can_capture(model, self._device),
            compiled=compiled,
        )
        self._next_row = 0
        """The next response without a slot."""
        self._cache_length = 0
        """Number of written positions in the cache."""
        self._read_length = self._capacity
        self._cache = DynamicCache(config=model.lm.config)
        self._slots = Slots.of(responses, torch.arange(0, device=self._device), 0)
        self._host_slots: list[HostSlot] = []
        """One for each slot."""

    def run(self) -> tuple[list[int], list[bool]]:
        """Generates all responses.

        Reports (tokens done, T) after each check, with T counted once for each time the slots are
        filled.

        Returns:
            The length of each response, and whether a stop string ended it.
        """
        responses = self._responses
        lengths, stopped = [responses.limit] * responses.count, [False] * responses.count
        total = responses.limit * -(-responses.count // self._slot_count)
        done = 0
        while True:
            new = self._admit()
            done += new
            # If every token is checked, so is the first one, sampled with the prompt.
            if not new or self._check_every > 1:
                done += self._decode()
            self._check_ended(lengths, stopped)
            self._report(min(done, total), total)
            self._drop_ended()
            if not self._host_slots and self._next_row == responses.count:
                self._step.release()
                return lengths, stopped

    # -- filling slots -------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fills free slots with waiting responses and samples their first tokens."""
        rows = range(self._next_row, min(self._responses.count, self._next_row + self._slot_count))
        if not rows:
            return False
        if not self._host_slots:
            position = self._cache_position if self._fixed_shapes else None
            self._cache = preallocated_cache(self._model.lm.config, self._capacity, position)
            self._cache_length = self._prompt_width
            self._cache_position.fill_(self._cache_length)
            self._slots = self._prefill(rows, self._cache)
            self._host_slots = [self._host_slot(row) for row in rows]
        else:
            free = [k for k, slot in enumerate(self._host_slots) if slot.ended]
            enough = min(len(rows), -(-self._slot_count // REFILL_SHARE))
            if not self._can_refill or len(free) < enough:
                return False
            free, rows = free[: len(rows)], rows[: len(free)]
            self._refill(free, rows)
        self._next_row = rows.stop
        return True

    def _host_slot(self, row: int) -> HostSlot:
        return HostSlot(row, self._cache_length - self._prompt_lengths[row])

    def _refill(self, free: list[int], rows: range) -> None:
        """Fills some slots, while the others keep what they have generated."""
        cache = preallocated_cache(self._model.lm.config, self._prompt_width)
        new = self._prefill(rows, cache)
        slots = torch.tensor(free).to(self._device)
        for mine, theirs in zip(
            self._set_layer_lengths(), full_attention_layers(cache) or (), strict=True
        ):
            mine.overwrite_prompts(slots, theirs)
        self._slots.overwrite(slots, new)
        for slot, row in zip(free, rows, strict=True):
            self._host_slots[slot] = self._host_slot(row)

    def _prefill(self, rows: range, cache: DynamicCache) -> Slots:
        """Processes the prompts of some responses and samples their first tokens."""
        batch, n = self._responses.batch, self._per_prompt
        first, last = rows.start // n, (rows.stop - 1) // n + 1
        ids, lengths = batch.ids[::n][first:last], batch.lengths[::n][first:last]
        logits, values = self._model(ids, left_mask(lengths, self._prompt_width), 1, cache=cache)
        logits, values = logits[:, 0], None if values is None else values[:, 0]
        if n > 1:
            index = torch.tensor([row // n - first for row in rows]).to(self._device)
            select_rows(cache, index)
            logits, values = logits[index], None if values is None else values[index]
        index = torch.arange(rows.start, rows.stop, device=self._device)
        slots = Slots.of(self._responses, index, self._cache_length)
        slots.sample(self._responses, logits, values)
        return slots

    # -- tokens --------------------------------------------------------------------------------

    def _decode(self) -> int:
        """Generates tokens until the next check; returns how many per slot."""
        live = [slot for slot in self._host_slots if not slot.ended]
        most = max((self._responses.limit - slot.token_count for slot in live), default=0)
        steps = min(self._check_every, most)
        if self._cache_length + steps > self._capacity:
            # Prompts that refill slots end at the cache's length, which must be at least their
            # width.
            first = min(slot.start for slot in live)
            self._move_to_front(min(first, self._cache_length - self._prompt_width))
        for _ in range(steps):
            if self._fixed_shapes:
                unit = self._read_unit
                self._read_length = (self._cache_length // unit + 1) * unit
            # Also the rows of the cache: compiled code may only be for slots that take all of them.
            rows = self._slot_count, self._read_length, self._capacity
            self._step((len(self._host_slots), *rows))
            self._cache_length += 1
        return steps

    def _fixed_step(self) -> None:
        """Generates one token per slot; shapes depend only on slot count and read length."""
        slots, positions = self._slots, self._positions[: self._read_length]
        for layer in full_attention_layers(self._cache) or ():
            layer.read_length = self._read_length
        attended = (positions >= slots.start[:, None]) & (positions <= self._cache_position)
        logits, values = self._model(
            slots.token[:, None], attended[:, None, None], 1,
            cache=self._cache, positions=slots.position[:, None],
        )  # fmt: skip
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])
        self._cache_position.add_(1)

    def _exact_step(self) -> None:
        """Generates one token per slot, reading the cache as far as it is written."""
        slots = self._slots
        attended = (self._positions[: self._cache_length + 1] >= slots.start[:, None]).long()
        logits, values = self._model(slots.token[:, None], attended, 1, cache=self._cache)
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])

    # -- ends of responses ---------------------------------------------------------------------

    def _check_ended(self, lengths: list[int], stopped: list[bool]) -> None:
        """Finds slots whose response has ended, and records its length."""
        counts, done = self._slots.to_host()
        ids: list[list[int]] = []
        if self._stop_criteria.has_strings:
            ids = self._responses.ids[self._slots.row].tolist()
        at_stop_string, ended = [], []
        for k, slot in enumerate(self._host_slots):
            if slot.ended:
                continue
            slot.token_count, at = counts[k], None
            if ids:
                at = self._stop_criteria.stops_at(ids[k][: slot.token_count], slot.searched)
                slot.searched = slot.token_count
            if at is not None:
                lengths[slot.row], stopped[slot.row] = at + 1, True
                at_stop_string.append(k)
            elif done[k]:
                lengths[slot.row] = slot.token_count
            slot.ended = at is not None or done[k]
            if slot.ended:
                ended.append(slot.row)
        if at_stop_string:
            self._slots.done[torch.tensor(at_stop_string).to(self._device)] = True
        if self._on_ended is not None and ended:
            tokens = self._responses.ids[torch.tensor(ended).to(self._device)].tolist()
            for row, sampled in zip(ended, tokens, strict=True):
                self._on_ended(row, sampled[: lengths[row]])

    def _drop_ended(self) -> None:
        """Drops slots that have ended and that no waiting response will fill."""
        if self._can_refill and self._next_row < self._responses.count:
            return
        live = [k for k, slot in enumerate(self._host_slots) if not slot.ended]
        size = len(live)
        if self._fixed_shapes and live:
            size = len(self._host_slots)
            while size // 2 >= max(len(live), MIN_SLOTS):
                size //= 2
        if size == len(self._host_slots):
            return
        # With fixed shapes, ended slots pad the number of slots to one that has a graph.
        ended = [k for k, slot in enumerate(self._host_slots) if slot.ended]
        keep = sorted(live + ended[: size - len(live)])
        self._host_slots = [self._host_slots[k] for k in keep]
        if keep:
            index = torch.tensor(keep).to(self._device)
            self._slots = self._slots.select(index)
            self._set_layer_lengths()
            select_rows(self._cache, index)

    # -- the cache -----------------------------------------------------------------------------

    def _set_layer_lengths(self) -> list[PreallocatedLayer]:
        """Sets the number of written positions in the cache's layers, before rows are moved.

        Returns: The layers; empty if some do not attend to all positions.
        """
        layers = full_attention_layers(self._cache) or []
        for layer in layers:
            layer.set_length(self._cache_length)
        return layers

    def _move_to_front(self, first: int) -> None:
        """Moves the positions from `first` on, the only ones still attended to, to the front."""
        for layer in self._set_layer_lengths():
            layer.drop_first(first)
        self._cache_length -= first
        self._cache_position.sub_(first)
        self._slots.start.sub_(first)
        for slot in self._host_slots:
            slot.start -= first


def takes_any_mask(model: AnyModel) -> bool:
    """Whether a model accepts positions, and a custom mask in place of transformers' own."""
    config = model.lm.config
    return (
        "position_ids" in inspect.signature(model.lm.forward).parameters
        and getattr(config, "_attn_implementation", None) in ("sdpa", DECODING_ATTENTION)
        and not getattr(config, "alibi", False)
    )
