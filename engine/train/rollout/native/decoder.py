"""The decoding loop: prompts are put into slots, and the slots generate token by token."""

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
)
from engine.train.rollout.native.slots import Responses, Slots
from engine.train.rollout.rollout import left_mask
from engine.train.rollout.stop_criteria import StopCriteria

READ_LENGTHS = 4
"""With fixed shapes, the most lengths to which the cache is read: its first quarter, half, ..."""
ALIGNMENT = 16
"""Lengths are multiples of it, or CUDA's attention kernels would copy the mask to pad it."""
MIN_SLOTS = 8
"""With fixed shapes, the number of slots is halved until here as responses end."""
REFILL_SHARE = 8
"""Ended slots are refilled when they are an eighth of all: a prompt alone is slow to process."""


@dataclass(frozen=True)
class Schedule:
    """How often the host reads what the device has sampled, and which shapes are computed."""

    check_every: int
    """Tokens between two checks of which responses have ended. Until the next, their slots compute
    tokens that are not kept."""
    fixed_shapes: bool
    """Whether the cache is read in a few lengths, and slots are dropped in a few sizes only, so
    that few CUDA graphs hold all tokens. Otherwise ended slots are dropped at each check."""
    read_step: int = 256
    """With fixed shapes, the least by which the lengths that the cache is read to differ. For each
    the host runs a token's kernels once more, to capture a graph: 24 to 39 ms for 24 layers.
    Reading 384 positions of 64 responses instead of 192 takes a layer 1 µs (both on an H200)."""


EXACT = Schedule(check_every=1, fixed_shapes=False)
"""For a CPU: it waits for each operation anyway, and each row and position costs time."""
GRAPHED = Schedule(check_every=16, fixed_shapes=True)
"""For a GPU: launches and checks cost more than rows and positions that are not needed."""


def schedule_for(device: torch.device) -> Schedule:
    """The schedule that suits a device."""
    return GRAPHED if device.type == "cuda" else EXACT


@dataclass
class HostSlot:
    """What the host knows of a slot: of the response that it holds, as of the last check."""

    row: int
    """Which response."""
    start: int
    """Where its prompt starts in the cache."""
    token_count: int = 1
    """Tokens sampled."""
    searched: int = 0
    """Tokens among which stop strings have been searched."""
    ended: bool = False


class Decoder:
    """Generates all responses with a model; call :meth:`run` once, inside the model's autocast.

    All slots write their next token at the same position of the cache. A prompt ends just before
    that position when its slot is filled; what is before the prompt belongs to an earlier response
    and is masked. So left padding is all that the model sees, whatever its architecture.
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
        compiled: set[Hashable] | None = None,
    ) -> None:
        """Allocates no cache yet.

        Args:
            model: in evaluation mode.
            responses: B prompts, and room for what is sampled.
            stop_criteria: when a response ends.
            schedule: see :func:`schedule_for`.
            report: see :meth:`run`.
            per_prompt: number of adjacent rows with the same prompt, which is processed once.
            at_once: number of slots; B when left out.
            compiled: shapes that the model's layers have been compiled for, if they are; see
                :class:`~engine.train.rollout.native.compiled_layers.CompiledLayers`.
        """
        self._model, self._responses, self._stop_criteria = model, responses, stop_criteria
        self._report = report
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
        """The next response that has no slot yet."""
        self._cache_length = 0
        """Positions of the cache that are written."""
        self._read_length = self._capacity
        self._cache = DynamicCache(config=model.lm.config)
        self._slots = Slots.of(responses, torch.arange(0, device=self._device), 0)
        self._host_slots: list[HostSlot] = []
        """One for each slot."""

    def run(self) -> tuple[list[int], list[bool]]:
        """Generates all responses.

        Reports (tokens done, T) after each check; T as often as the slots are filled.

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
            # Where every token is checked, so is the first, which the prompt's pass sampled.
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
        """Fills free slots with waiting responses; their first tokens are sampled."""
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
        """Processes the prompts of some responses, and samples their first tokens."""
        batch, n = self._responses.batch, self._per_prompt
        first, last = rows.start // n, (rows.stop - 1) // n + 1
        ids, lengths = batch.ids[::n][first:last], batch.lengths[::n][first:last]
        logits, values = self._model(ids, left_mask(lengths, self._prompt_width), 1, cache=cache)
        logits, values = logits[:, 0], None if values is None else values[:, 0]
        if n > 1:
            index = torch.tensor([row // n - first for row in rows]).to(self._device)
            cache.batch_select_indices(index)
            logits, values = logits[index], None if values is None else values[index]
        index = torch.arange(rows.start, rows.stop, device=self._device)
        slots = Slots.of(self._responses, index, self._cache_length)
        slots.sample(self._responses, logits, values)
        return slots

    # -- tokens --------------------------------------------------------------------------------

    def _decode(self) -> int:
        """Generates tokens until the next check; returns how many for each slot."""
        live = [slot for slot in self._host_slots if not slot.ended]
        most = max((self._responses.limit - slot.token_count for slot in live), default=0)
        steps = min(self._check_every, most)
        if self._cache_length + steps > self._capacity:
            # The prompts that refill slots end at the cache's length, and need their width there.
            first = min(slot.start for slot in live)
            self._move_to_front(min(first, self._cache_length - self._prompt_width))
        for _ in range(steps):
            if self._fixed_shapes:
                unit = self._read_unit
                self._read_length = (self._cache_length // unit + 1) * unit
            self._step((len(self._host_slots), self._read_length, self._capacity))
            self._cache_length += 1
        return steps

    def _fixed_step(self) -> None:
        """One token of each slot; shapes depend on the number of slots and the read length only."""
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
        """One token of each slot; the cache is read as far as it is written."""
        slots = self._slots
        attended = (self._positions[: self._cache_length + 1] >= slots.start[:, None]).long()
        logits, values = self._model(slots.token[:, None], attended, 1, cache=self._cache)
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])

    # -- ends of responses ---------------------------------------------------------------------

    def _check_ended(self, lengths: list[int], stopped: list[bool]) -> None:
        """Finds the slots whose response has ended, and keeps its length."""
        counts, done = self._slots.to_host()
        ids: list[list[int]] = []
        if self._stop_criteria.has_strings:
            ids = self._responses.ids[self._slots.row].tolist()
        at_stop_string = []
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
        if at_stop_string:
            self._slots.done[torch.tensor(at_stop_string).to(self._device)] = True

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
        # With fixed shapes, ended slots fill up the size, for which there is or will be one graph.
        ended = [k for k, slot in enumerate(self._host_slots) if slot.ended]
        keep = sorted(live + ended[: size - len(live)])
        self._host_slots = [self._host_slots[k] for k in keep]
        if keep:
            index = torch.tensor(keep).to(self._device)
            self._slots = self._slots.select(index)
            self._set_layer_lengths()
            self._cache.batch_select_indices(index)

    # -- the cache -----------------------------------------------------------------------------

    def _set_layer_lengths(self) -> list[PreallocatedLayer]:
        """Tells the cache's layers how many positions are written, before rows are moved.

        Returns:
            The layers; none if some do not attend to all positions.
        """
        layers = full_attention_layers(self._cache) or []
        for layer in layers:
            layer.set_length(self._cache_length)
        return layers

    def _move_to_front(self, first: int) -> None:
        """Moves the positions from `first` on, all that is still attended to, to the front."""
        for layer in self._set_layer_lengths():
            layer.drop_first(first)
        self._cache_length -= first
        self._cache_position.sub_(first)
        self._slots.start.sub_(first)
        for slot in self._host_slots:
            slot.start -= first


def takes_any_mask(model: AnyModel) -> bool:
    """Whether a model takes positions, and a mask of our own in the place of transformers'."""
    config = model.lm.config
    return (
        "position_ids" in inspect.signature(model.lm.forward).parameters
        and getattr(config, "_attn_implementation", None) in ("sdpa", DECODING_ATTENTION)
        and not getattr(config, "alibi", False)
    )
