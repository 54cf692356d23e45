"""The decoding loop: assigns prompts to slots, which generate token by token."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from engine.progress import ReportProgress
from engine.train.models.language_model import AnyModel
from engine.train.rollout.native.cuda_graph import GraphedFunction, can_capture
from engine.train.rollout.native.kv_cache import select_rows
from engine.train.rollout.native.schedule import Schedule
from engine.train.rollout.native.slot_cache import SlotCache
from engine.train.rollout.native.slots import Responses, Slots
from engine.train.rollout.rollout import OnEnded, left_mask
from engine.train.rollout.stop_criteria import StopCriteria

MIN_SLOTS = 8
"""With fixed shapes, the number of slots is halved down to this as responses end."""
REFILL_SHARE = 8
"""Ended slots are refilled once they are an eighth of all, since single prompts are inefficient."""


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
    """Generates all responses with a model; call :meth:`run` once, inside the model's autocast."""

    def __init__(
        self,
        model: AnyModel,
        responses: Responses,
        stop_criteria: StopCriteria,
        schedule: Schedule,
        report: ReportProgress,
        *,
        at_once: int | None,
        compiled: set[Hashable] | None,
        on_ended: OnEnded | None,
    ) -> None:
        """Allocates no cache yet.

        Args:
            model: in evaluation mode.
            responses: what to generate, and room for the sampled tokens.
            stop_criteria: when a response ends.
            schedule: see :func:`schedule_for`.
            report: see :meth:`run`.
            at_once: number of slots; default: B.
            compiled: shapes that the model's layers have been compiled for; None if they are not.
                See :class:`~engine.train.rollout.native.compiled_layers.CompiledLayers`.
            on_ended: called after the check at which a response has ended.
        """
        self._model, self._responses, self._stop_criteria = model, responses, stop_criteria
        self._report, self._on_ended = report, on_ended
        self._device = responses.ids.device
        self._slot_count = min(at_once or responses.count, responses.count)
        self._prompt_lengths = responses.request.batch.lengths.tolist()
        room = responses.limit
        if self._slot_count < responses.count:  # so that positions are not moved at every check
            room += max(responses.limit // 2, schedule.check_every)
        self._cache = SlotCache(
            model, responses.request.batch.ids.shape[1], room, schedule, self._device
        )  # fmt: skip
        self._check_every = schedule.check_every
        self._step = GraphedFunction(
            self._generate_token,
            usable=self._cache.fixed_shapes and can_capture(model, self._device),
            compiled=compiled,
        )
        self._next_row = 0
        """The next response without a slot."""
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
            self._cache.start()
            self._slots = self._prefill(rows, self._cache.model_cache)
            self._host_slots = [self._host_slot(row) for row in rows]
        else:
            free = [k for k, slot in enumerate(self._host_slots) if slot.ended]
            enough = min(len(rows), -(-self._slot_count // REFILL_SHARE))
            if not self._cache.can_refill or len(free) < enough:
                return False
            free, rows = free[: len(rows)], rows[: len(free)]
            self._refill(free, rows)
        self._next_row = rows.stop
        return True

    def _host_slot(self, row: int) -> HostSlot:
        return HostSlot(row, self._cache.length - self._prompt_lengths[row])

    def _refill(self, free: list[int], rows: range) -> None:
        """Fills some slots, while the others keep what they have generated."""
        prompts = self._cache.cache_of_prompts()
        new = self._prefill(rows, prompts)
        slots = torch.tensor(free).to(self._device)
        self._cache.refill(slots, prompts)
        self._slots.overwrite(slots, new)
        for slot, row in zip(free, rows, strict=True):
            self._host_slots[slot] = self._host_slot(row)

    def _prefill(self, rows: range, cache: DynamicCache) -> Slots:
        """Processes the prompts of some responses and samples their first tokens."""
        request = self._responses.request
        batch, n = request.batch, request.per_prompt
        first, last = rows.start // n, (rows.stop - 1) // n + 1
        ids, lengths = batch.ids[::n][first:last], batch.lengths[::n][first:last]
        logits, values, _ = self._model(ids, left_mask(lengths, ids.shape[1]), 1, cache=cache)
        logits, values = logits[:, 0], None if values is None else values[:, 0]
        if n > 1:
            index = torch.tensor([row // n - first for row in rows]).to(self._device)
            select_rows(cache, index)
            logits, values = logits[index], None if values is None else values[index]
        index = torch.arange(rows.start, rows.stop, device=self._device)
        slots = Slots.of(self._responses, index, self._cache.length)
        slots.sample(self._responses, logits, values)
        return slots

    # -- tokens --------------------------------------------------------------------------------

    def _decode(self) -> int:
        """Generates tokens until the next check; returns how many per slot."""
        live = [slot for slot in self._host_slots if not slot.ended]
        most = max((self._responses.limit - slot.token_count for slot in live), default=0)
        steps, cache = min(self._check_every, most), self._cache
        if cache.length + steps > cache.capacity:
            moved = cache.drop_first(min(slot.start for slot in live))
            self._slots.start.sub_(moved)
            for slot in self._host_slots:
                slot.start -= moved
        for _ in range(steps):
            cache.set_read_length()
            # Also the rows of the cache: compiled code may only be for slots that take all of them.
            rows = self._slot_count, cache.read_length, cache.capacity
            self._step((len(self._host_slots), *rows))
            cache.length += 1
        return steps

    def _generate_token(self) -> None:
        """Generates one token per slot.

        With fixed shapes, they depend only on the number of slots and the read length.
        """
        slots, cache, positions = self._slots, self._cache, None
        attended = cache.attended(slots.start)
        if cache.fixed_shapes:
            attended, positions = attended[:, None, None], slots.position[:, None]
        logits, values, _ = self._model(
            slots.token[:, None], attended, 1, cache=cache.model_cache, positions=positions
        )
        slots.sample(self._responses, logits[:, 0], None if values is None else values[:, 0])
        if cache.fixed_shapes:
            cache.position.add_(1)

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
        if self._cache.can_refill and self._next_row < self._responses.count:
            return
        live = [k for k, slot in enumerate(self._host_slots) if not slot.ended]
        size = len(live)
        if self._cache.fixed_shapes and live:
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
            self._cache.keep(index)
