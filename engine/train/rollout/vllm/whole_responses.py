"""Responses of one turn each, which the engines generate for all ranks."""

import threading
from collections.abc import Collection
from dataclasses import dataclass

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from engine.protocol.rollout.messages import NextTurn
from engine.train.rollout.conversation import SampledTurn
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import OnEnded, Rollout, assemble


class Part(msgspec.Struct, frozen=True):
    """The prompts of one rank."""

    prompts: list[list[int]]
    limits: list[int]
    uniforms: bytes
    """(n, T) float64."""


class EndedResponse(msgspec.Struct, frozen=True, array_like=True):
    """A response as it is sent to all ranks."""

    ids: list[int]
    floats: bytes
    """(3, tokens) float32: log-probabilities, entropies and values."""
    eos: bool
    ended: bool
    version: int
    """As in :attr:`Rollout.versions`."""


class WholeResponses:
    """The responses on rank 0; a :class:`TurnSource` whose turns are all ready at the beginning."""

    def __init__(self, parts: list[Part], limit: int, on_ended: OnEnded | None) -> None:
        """Makes all responses ready.

        Args:
            parts: those of the ranks, in the order of the rows.
            limit: T, the most tokens of a response.
            on_ended: called with each response that has ended; again if its engine is then lost.
        """
        self.lock = threading.RLock()
        rows = [
            (prompt, part.uniforms[8 * limit * i :][: 8 * most])
            for part in parts
            for i, (prompt, most) in enumerate(zip(part.prompts, part.limits, strict=True))
        ]
        self.count, self.tokens = len(rows), limit
        self.longest = max(len(prompt) + len(uniforms) // 8 for prompt, uniforms in rows)
        self._turns = [NextTurn(i, *row) for i, row in enumerate(rows)]
        self._on_ended = on_ended
        self._taken: set[int] = set()
        self._ended: dict[int, SampledTurn] = {}

    def take(self, rows: range, at_most: int, *, wait: bool) -> list[NextTurn] | None:
        """See :class:`TurnSource`."""
        del wait  # an engine that has nothing to do has generated what was ready
        with self.lock:
            if all(row in self._ended for row in rows):
                return None
            ready = [row for row in rows if row not in self._taken][:at_most]
            self._taken.update(ready)
            return [self._turns[row] for row in ready]

    def release(self, rows: range, taken: Collection[int]) -> None:
        """Makes all responses of an engine ready again, also those that have ended.

        So another process generates the same batch, and every bit is the same.
        """
        del taken
        with self.lock:
            self._taken -= set(rows)
            for row in rows:
                self._ended.pop(row, None)

    def add(self, turn: SampledTurn) -> None:
        """See :class:`TurnSource`."""
        self._ended[turn.row] = turn
        if self._on_ended is not None:
            self._on_ended(turn.row, turn.ids)

    def meanwhile(self) -> None:
        """See :class:`TurnSource`."""

    def ended(self) -> list[EndedResponse]:
        """All responses, in the order of the rows."""
        turns = [self._ended[row] for row in range(self.count)]
        return [
            EndedResponse(t.ids, t.floats.numpy().tobytes(), t.eos, t.ended, t.version)
            for t in turns
        ]


@dataclass(frozen=True)
class Work:
    """One rank's view of the responses that all ranks generate together."""

    request: RolloutRequest
    """This rank's."""
    first: int
    """The row of this rank's first prompt."""
    responses: WholeResponses | None
    """On rank 0, those of all ranks."""

    def rollout(
        self, ended: list[EndedResponse], device: torch.device, tokenizer: PreTrainedTokenizerBase
    ) -> Rollout:
        """The rollout of this rank's prompts, on a device; `ended` are those of all ranks."""
        shape = self.request.uniforms.shape
        mine = ended[self.first : self.first + shape[0]]
        ids, floats = torch.zeros(shape, dtype=torch.int64), torch.zeros(3, *shape)
        for row, response in enumerate(mine):
            length = len(response.ids)
            numbers = torch.frombuffer(bytearray(response.floats), dtype=torch.float32)
            ids[row, :length] = torch.tensor(response.ids)
            floats[:, row, :length] = numbers.view(3, length)
        lengths = torch.tensor([len(response.ids) for response in mine])
        eos = torch.tensor([response.eos for response in mine])
        stopped = torch.tensor([response.ended for response in mine])
        rollout = assemble(
            self.request.batch.to(device), ids.to(device), lengths.to(device), eos.to(device),
            stopped.to(device), floats.to(device), tokenizer,
        )  # fmt: skip
        rollout.versions = torch.tensor([response.version for response in mine]).to(device)
        return rollout
