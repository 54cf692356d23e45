"""The decoding loop: prompts are put into slots, and the slots generate token by token."""

import inspect
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from engine.train.models.language_model import AnyModel
from engine.train.rollout.cuda_graph import GraphedFunction, can_capture
from engine.train.rollout.decoding_attention import DECODING_ATTENTION
from engine.train.rollout.kv_cache import (
    PreallocatedLayer,
    full_attention_layers,
    preallocated_cache,
)
from engine.train.rollout.rollout import ReportProgress, left_mask
from engine.train.rollout.slots import Responses, Slots
from engine.train.rollout.stop_criteria import StopCriteria

VIEWS = 4
"""Lengths of the cache, with fixed shapes: a token attends to the first quarter, half, ..."""
ALIGNMENT = 16
"""Lengths are multiples of it, or CUDA's attention kernels would copy the mask to pad it."""
FEWEST_SLOTS = 8
"""With fixed shapes, the number of slots is halved until here as responses end."""
REFILL_SHARE = 8
"""Ended slots are refilled when they are an eighth of all: a prompt alone is slow to process."""


@dataclass(frozen=True)
class Schedule:
    """How often the host looks at the device, and with which shapes the device computes."""

    look_every: int
    """Tokens between two looks. Until the next look, ended slots go on in vain."""
    fixed_shapes: bool
    """Whether the cache is read in a few lengths, and slots are dropped in a few sizes only, so
    that few CUDA graphs hold all tokens. Otherwise ended slots are dropped at each look."""


EXACT = Schedule(look_every=1, fixed_shapes=False)
"""For a CPU: it waits for each operation anyway, and each row and position costs time."""
GRAPHED = Schedule(look_every=16, fixed_shapes=True)
"""For a GPU: launches and looks cost more than rows and positions that are not needed."""


def schedule_for(device: torch.device) -> Schedule:
    """The schedule that suits a device."""
    return GRAPHED if device.type == "cuda" else EXACT


@dataclass
class Held:
    """The response that a slot holds, as far as the host knows."""

    row: int
    """Which one."""
    start: int
    """Where its prompt starts in the cache."""
    count: int = 1
    """Tokens sampled."""
    searched: int = 0
    """Tokens among which stop strings have been searched."""
    ended: bool = False


class Decoder:
    """Generates all responses with a model; call :meth:`run` once, inside the model's autocast.

    All slots write their next token at the same position of the cache, :attr:`clock`. A prompt ends
    where the clock stands when its slot is filled; what is before it belongs to an earlier response
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
                :class:`~engine.train.rollout.compiled_layers.CompiledLayers`.
        """
        self._model, self._responses, self._stop_criteria = model, responses, stop_criteria
        self._report = report
        self._per_prompt = per_prompt
        self._device = responses.ids.device
        self._count = min(at_once or responses.count, responses.count)
        self._width = responses.batch.ids.shape[1]
        self._lengths = responses.batch.lengths.tolist()
        room = responses.limit
        if self._count < responses.count:  # so that positions are not moved at every look
            room += max(responses.limit // 2, schedule.look_every)
        self._capacity = self._width + room
        layers = full_attention_layers(preallocated_cache(model.lm.config, self._capacity))
        self._can_refill = layers is not None
        self._fixed = schedule.fixed_shapes and self._can_refill and takes_any_mask(model)
        if self._fixed:
            unit = VIEWS * ALIGNMENT
            self._capacity = -(-self._capacity // unit) * unit
        self._places = torch.arange(self._capacity, device=self._device)
        self._place = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._look_every = schedule.look_every
        self._step = GraphedFunction(
            self._fixed_step if self._fixed else self._exact_step,
            usable=self._fixed and can_capture(model, self._device),
            compiled=compiled,
        )
        self._waiting = 0
        """The next response that has no slot yet."""
        self.clock = 0
        """Positions of the cache that are written."""
        self._view = self._capacity
        self._cache = DynamicCache(config=model.lm.config)
        self._slots = Slots.of(responses, torch.arange(0, device=self._device), 0)
        self._held: list[Held] = []
        """By slot."""

    def run(self) -> tuple[list[int], list[bool]]:
        """Generates all responses.

        Reports (tokens done, T) after each look; T as often as the slots are filled.

        Returns:
            The length of each response, and whether a stop string ended it.
        """
        responses = self._responses
        lengths, stopped = [responses.limit] * responses.count, [False] * responses.count
        total = responses.limit * -(-responses.count // self._count)
        done = 0
        while True:
            new = self._admit()
            done += new
            if not new or self._look_every > 1:
                done += self._advance()
            self._look(lengths, stopped)
            self._report(min(done, total), total)
            self._drop_ended()
            if not self._held and self._waiting == responses.count:
                self._step.release()
                return lengths, stopped

    # -- filling slots -------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fills free slots with waiting responses; their first tokens are sampled."""
        rows = range(self._waiting, min(self._responses.count, self._waiting + self._count))
        if not rows:
            return False
        if not self._held:
            place = self._place if self._fixed else None
            self._cache = preallocated_cache(self._model.lm.config, self._capacity, place)
            self.clock = self._width
            self._place.fill_(self.clock)
            self._slots = self._prompts(rows, self._cache)
            self._held = [self._hold(row) for row in rows]
        else:
            free = [k for k, held in enumerate(self._held) if held.ended]
            if not self._can_refill or len(free) < min(len(rows), -(-self._count // REFILL_SHARE)):
                return False
            free, rows = free[: len(rows)], rows[: len(free)]
            self._refill(free, rows)
        self._waiting = rows.stop
        return True

    def _hold(self, row: int) -> Held:
        return Held(row, self.clock - self._lengths[row])

    def _refill(self, free: list[int], rows: range) -> None:
        cache = preallocated_cache(self._model.lm.config, self._width)
        new = self._prompts(rows, cache)
        slots = torch.tensor(free).to(self._device)
        for mine, theirs in zip(self._layers(), full_attention_layers(cache) or (), strict=True):
            mine.put(slots, theirs)
        self._slots.put(slots, new)
        for slot, row in zip(free, rows, strict=True):
            self._held[slot] = self._hold(row)

    def _prompts(self, rows: range, cache: DynamicCache) -> Slots:
        """Processes the prompts of some responses, and samples their first tokens."""
        batch, each = self._responses.batch, self._per_prompt
        first, last = rows.start // each, (rows.stop - 1) // each + 1
        ids, lengths = batch.ids[::each][first:last], batch.lengths[::each][first:last]
        logits, values = self._model(ids, left_mask(lengths, self._width), 1, cache=cache)
        logits, values = logits[:, 0], None if values is None else values[:, 0]
        if each > 1:
            index = torch.tensor([row // each - first for row in rows]).to(self._device)
            cache.batch_select_indices(index)
            logits, values = logits[index], None if values is None else values[index]
        slots = Slots.of(
            self._responses, torch.arange(rows.start, rows.stop, device=self._device), self.clock
        )
        slots.sample(self._responses, logits, values)
        return slots

    # -- tokens --------------------------------------------------------------------------------

    def _advance(self) -> int:
        """Generates tokens until the next look; returns how many."""
        live = [held for held in self._held if not held.ended]
        most = max((self._responses.limit - held.count for held in live), default=0)
        steps = min(self._look_every, most)
        if self.clock + steps > self._capacity:
            # The next prompts still need their width before the clock.
            first = min(held.start for held in live)
            self._move_to_front(min(first, self.clock - self._width))
        for _ in range(steps):
            if self._fixed:
                unit = self._capacity // VIEWS
                self._view = (self.clock // unit + 1) * unit
            self._step((len(self._held), self._view, self._capacity))
            self.clock += 1
        return steps

    def _fixed_step(self) -> None:
        """One token of each slot, of shapes that depend on the slots and the view alone."""
        slots, places = self._slots, self._places[: self._view]
        for layer in full_attention_layers(self._cache) or ():
            layer.view = self._view
        seen = (places >= slots.start[:, None]) & (places <= self._place)
        logits, values = self._model(
            slots.token[:, None], seen[:, None, None], 1,
            cache=self._cache, positions=slots.position[:, None],
        )  # fmt: skip
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])
        self._place.add_(1)

    def _exact_step(self) -> None:
        """One token of each slot; the cache is read as far as it is written."""
        slots = self._slots
        seen = (self._places[: self.clock + 1] >= slots.start[:, None]).long()
        logits, values = self._model(slots.token[:, None], seen, 1, cache=self._cache)
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])

    # -- looks ---------------------------------------------------------------------------------

    def _look(self, lengths: list[int], stopped: list[bool]) -> None:
        """Finds the slots whose response has ended, and keeps its length."""
        counts, done = self._slots.look()
        texts: list[list[int]] = []
        if self._stop_criteria.has_strings:
            texts = self._responses.ids[self._slots.row].tolist()
        halted = []
        for k, held in enumerate(self._held):
            if held.ended:
                continue
            held.count, at = counts[k], None
            if texts:
                at = self._stop_criteria.stops_at(texts[k][: held.count], held.searched)
                held.searched = held.count
            if at is not None:
                lengths[held.row], stopped[held.row] = at + 1, True
                halted.append(k)
            elif done[k]:
                lengths[held.row] = held.count
            held.ended = at is not None or done[k]
        if halted:
            self._slots.done[torch.tensor(halted).to(self._device)] = True

    def _drop_ended(self) -> None:
        """Drops slots that have ended and that no waiting response will fill."""
        live = [k for k, held in enumerate(self._held) if not held.ended]
        if self._can_refill and self._waiting < self._responses.count:
            return
        size = len(live)
        if self._fixed and live:
            size = len(self._held)
            while size // 2 >= max(len(live), FEWEST_SLOTS):
                size //= 2
        if size == len(self._held):
            return
        ended = [k for k, held in enumerate(self._held) if held.ended]
        keep = sorted(live + ended[: size - len(live)])
        self._held = [self._held[k] for k in keep]
        if keep:
            index = torch.tensor(keep).to(self._device)
            self._slots = self._slots.select(index)
            self._layers()
            self._cache.batch_select_indices(index)

    # -- the cache -----------------------------------------------------------------------------

    def _layers(self) -> list[PreallocatedLayer]:
        """The cache's layers, if all attend to all positions; they know how many are written."""
        layers = full_attention_layers(self._cache) or []
        for layer in layers:
            layer.set_length(self.clock)
        return layers

    def _move_to_front(self, first: int) -> None:
        """Moves the positions from `first` on, all that is still attended to, to the front."""
        for layer in self._layers():
            layer.drop_first(first)
        self.clock -= first
        self._place.sub_(first)
        self._slots.start.sub_(first)
        for held in self._held:
            held.start -= first


def takes_any_mask(model: AnyModel) -> bool:
    """Whether a model takes positions, and a mask of our own in the place of transformers'."""
    config = model.lm.config
    return (
        "position_ids" in inspect.signature(model.lm.forward).parameters
        and getattr(config, "_attn_implementation", None) in ("sdpa", DECODING_ATTENTION)
        and not getattr(config, "alibi", False)
    )
