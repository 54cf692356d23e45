"""Responses of several turns: where the tokens of the policy stand among those of an environment.

A response token is one that the policy sampled, in any turn. So all that is computed for response
tokens (advantages, losses, the KL) needs no other mask, and the last token of a turn is followed by
the first one of the next. The replies of an environment are context, as the prompt is.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from engine.progress import ReportProgress
from engine.protocol.rollout.messages import NextTurn
from engine.train.data.prompts import Messages


@dataclass(frozen=True)
class Turns:
    """One response as messages."""

    messages: Messages
    """Those of the policy, `assistant`, and of its environment, in turn."""
    replies: list[tuple[int, int]]
    """Start and end of each reply in the text of the response, in characters."""
    environment: Any = None
    """What replied: an object of the user's; None on ranks other than 0."""
    before_replies: list[int] = field(default_factory=list)
    """For each reply, the number of tokens that the policy had sampled before it."""
    sampled: list[str] = field(default_factory=list)
    """The texts of the policy's turns."""
    tool_calls: int = 0
    """Number of tool calls in them."""
    failed_calls: int = 0
    """How many of them failed."""
    reply_left_out: bool = False
    """Whether the response ended because a reply did not fit into `environment.max_tokens`."""

    @property
    def count(self) -> int:
        """Number of turns of the policy."""
        return len(self.replies) + 1


@dataclass(frozen=True)
class SampledTurn:
    """One turn of the policy."""

    row: int
    """The response's row in the batch."""
    ids: list[int]
    floats: Tensor
    """(3, n) float32, on the host: log-probabilities, entropies and values."""
    eos: bool
    """Whether the last token is an end-of-sequence token."""
    ended: bool
    """Whether the turn ended by itself."""
    version: int
    """The step whose update produced the weights that sampled it."""


RunOnRank0 = Callable[[Callable[[ReportProgress], None]], None]
"""Calls a function on rank 0, with what it reports its progress to, while the other ranks wait; a
collective."""


class TurnSource(Protocol):
    """Responses whose turns do not wait for each other, on rank 0; called by several threads.

    A response without an environment has one turn.
    """

    lock: threading.RLock
    """To be held for :meth:`add`, and whenever the tokenizer is used."""
    count: int
    """Number of responses."""
    longest: int
    """The most tokens of a prompt and a response with its replies."""
    tokens: int
    """The most tokens that the policy samples in a response."""

    def take(self, rows: range, at_most: int, *, wait: bool) -> list[NextTurn] | None:
        """Takes turns to generate; None if no more are to come, or none is needed any more.

        Args:
            rows: the responses to take turns of, besides those that were released.
            at_most: how many.
            wait: whether to wait until there is one.
        """

    def release(self, rows: range, taken: Collection[int]) -> None:
        """Makes turns ready again whose engine is gone.

        Args:
            rows: the responses that it took turns of.
            taken: responses whose turn it has taken and not added.
        """

    def add(self, turn: SampledTurn) -> None:
        """Adds a turn that was taken and has been generated."""

    def meanwhile(self) -> None:
        """Called regularly by the main thread while others take and add turns."""


@dataclass(frozen=True)
class Conversation:
    """What follows the prompts of B responses: S tokens of policy and environments."""

    ids: Tensor
    """(B, S) int64, 0 beyond the length."""
    lengths: Tensor
    """(B,) int64; the last token is the policy's."""
    positions: Tensor
    """(B, T) int64: where each response token stands in `ids`; any beyond a response's length."""
    turns: list[Turns]
    environment_seconds: float = 0.0
    """How long all ranks waited for environments."""
    has_tools: bool = False
    """Whether the policy can call tools."""

    def select(self, rows: Tensor) -> "Conversation":
        """Selects responses by indices on the host; S and T stay the same."""
        return Conversation(
            self.ids[rows], self.lengths[rows], self.positions[rows],
            [self.turns[i] for i in rows.tolist()], self.environment_seconds, self.has_tools,
        )  # fmt: skip

    def replaced(self, rows: Tensor, other: "Conversation", other_rows: Tensor) -> "Conversation":
        """Returns one with some rows taken from another; both row indices are (n,) int64."""
        turns = list(self.turns)
        for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
            turns[row] = other.turns[other_row]
        return Conversation(
            replaced_rows(self.ids, rows, other.ids, other_rows),
            replaced_rows(self.lengths, rows, other.lengths, other_rows),
            replaced_rows(self.positions, rows, other.positions, other_rows),
            turns,
            self.environment_seconds + other.environment_seconds,
            self.has_tools,
        )


def replaced_rows(old: Tensor, rows: Tensor, new: Tensor, new_rows: Tensor) -> Tensor:
    """Replaces rows of a tensor; pads both at the end with 0 to the wider of two matrices."""
    if old.dim() == 2:
        width = max(old.shape[1], new.shape[1])
        old, new = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (old, new))
    replaced: Tensor = old.index_copy(0, rows, new[new_rows])
    return replaced
