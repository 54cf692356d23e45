"""A response while its turns are generated, and the rollout of finished responses."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.data.prompts import Messages, Prompt, PromptBatch
from engine.train.environment.environments import Answer
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.rollout.conversation import Conversation, SampledTurn, Turns
from engine.train.rollout.rollout import Rollout, response_text


@dataclass(frozen=True)
class Limits:
    """The limits of a response."""

    turns: int
    """Maximum number of turns of the policy."""
    tokens: int
    """Maximum number of tokens of the policy, in all turns together."""
    reply_tokens: int
    """Maximum number of tokens of the environment."""


@dataclass
class Response:
    """One response while it is generated; its tensors are on the host."""

    prompt: Prompt
    environment: object
    """None on ranks other than 0."""
    limits: Limits
    ids: list[int] = field(default_factory=list)
    """All tokens after the prompt."""
    positions: list[int] = field(default_factory=list)
    """Those that the policy sampled, as indices of :attr:`ids`."""
    floats: list[Tensor] = field(default_factory=list)
    """For each turn, (3, n) float32: log-probabilities, entropies and values."""
    messages: Messages = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)
    """The texts of the policy's turns."""
    last_turn: str = ""
    """The text of the policy's last turn, as the environment gets it: with special tokens, since
    some models write tool calls with them, but without the one that ends the turn."""
    replies: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each reply, as indices of :attr:`ids`."""
    eos: bool = False
    """Whether the last token is an end-of-sequence token."""
    ended: bool = False
    """Whether the last turn ended by itself; of a finished response, whether that did."""
    tool_calls: int = 0
    failed_calls: int = 0
    reply_left_out: bool = False
    """As in :attr:`Turns.reply_left_out`."""
    version: int = 0
    """As in :attr:`Rollout.versions`."""

    @property
    def turn(self) -> int:
        """The number of the present turn, from 1."""
        return len(self.replies) + 1

    @property
    def left(self) -> int:
        """How many tokens the policy may still sample."""
        return self.limits.tokens - len(self.positions)

    @property
    def reply_tokens(self) -> int:
        """Number of tokens that the environment wrote."""
        return len(self.ids) - len(self.positions)

    @property
    def before_replies(self) -> list[int]:
        """For each reply, the number of tokens that the policy had sampled before it."""
        return [bisect_left(self.positions, start) for start, _ in self.replies]

    @property
    def next_prompt(self) -> Prompt:
        """What the next turn responds to: everything so far."""
        prompt = self.prompt
        return Prompt(prompt.ids + self.ids, prompt.text, prompt.row, prompt.messages)

    def add_turn(self, turn: SampledTurn, tokenizer: PreTrainedTokenizerBase) -> None:
        """Appends a turn of the policy; the tokenizer is the policy's."""
        ids = turn.ids
        self.positions += range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        self.floats.append(turn.floats)
        self.eos, self.ended, self.version = turn.eos, turn.ended, turn.version
        self.sampled.append(response_text(ids, tokenizer))
        self.messages.append({"role": "assistant", "content": self.sampled[-1]})
        self.last_turn = str(tokenizer.decode(ids[:-1] if self.eos else ids))

    def reply_ids(self, reply: Messages, encode: ReplyTokens) -> list[int]:
        """Encodes a reply; returns nothing if no other turn can follow it."""
        follows = self.ended and self.turn < self.limits.turns and self.left > 0
        return encode(self.prompt, reply, self.ids[-1]) if follows else []

    def continue_with(self, answer: Answer) -> bool:
        """Appends what follows a turn; returns False if the response ends instead."""
        self.tool_calls += answer.tool_calls
        self.failed_calls += answer.failed_calls
        if answer.messages is None or not self.ended:
            return False
        fits = self.reply_tokens + len(answer.ids) <= self.limits.reply_tokens
        if self.turn == self.limits.turns or not fits or not self.left:
            self.ended = False  # the environment would have gone on
            self.reply_left_out = not fits
            return False
        self.add_reply(answer.ids, answer.messages)
        return True

    def add_reply(self, ids: list[int], messages: Messages) -> None:
        """Appends a reply of the environment: its tokens and its messages."""
        self.replies.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.messages += messages


class FinishedResponse(msgspec.Struct, frozen=True, array_like=True):
    """A finished response as it is sent to the ranks that have not made it."""

    ids: list[int]
    positions: list[int]
    floats: bytes
    """(3, tokens) float32."""
    messages: Messages
    sampled: list[str]
    replies: list[tuple[int, int]]
    eos: bool
    ended: bool
    tool_calls: int
    failed_calls: int
    reply_left_out: bool
    version: int

    @classmethod
    def of(cls, response: Response) -> "FinishedResponse":
        """What is sent of a response."""
        floats = torch.cat(response.floats, 1).numpy().tobytes()
        same = {name: getattr(response, name) for name in cls.__struct_fields__ if name != "floats"}
        return cls(floats=floats, **same)

    def copy_to(self, response: Response) -> None:
        """Sets all of a response but its prompt and environment."""
        for name in self.__struct_fields__:
            setattr(response, name, getattr(self, name))
        floats = torch.frombuffer(bytearray(self.floats), dtype=torch.float32)
        response.floats = [floats.view(3, -1)]


def rollout_of(
    responses: Sequence[Response],
    batch: PromptBatch,
    tokenizer: PreTrainedTokenizerBase,
    environment_seconds: float,
    *,
    has_tools: bool,
) -> Rollout:
    """Builds the rollout of finished responses, on the batch's device.

    Args:
        responses: B of them.
        batch: their prompts.
        tokenizer: the policy's.
        environment_seconds: how long the ranks waited for environments.
        has_tools: whether the policy can call tools.
    """
    device = batch.ids.device
    count, width = len(responses), max(len(r.positions) for r in responses)
    floats = torch.zeros(3, count, width)
    for i, response in enumerate(responses):
        floats[:, i, : len(response.positions)] = torch.cat(response.floats, 1)
    logprobs, entropies, values = floats.to(device)

    def on_device(values: list[int] | list[bool]) -> Tensor:
        return torch.tensor(values).to(device)

    return Rollout(
        batch=batch,
        ids=_padded([[r.ids[at] for at in r.positions] for r in responses]).to(device),
        lengths=on_device([len(r.positions) for r in responses]),
        eos=on_device([r.eos for r in responses]),
        ended=on_device([r.ended for r in responses]),
        logprobs=logprobs,
        entropies=entropies,
        values=values,
        texts=[response_text(r.ids, tokenizer) for r in responses],
        versions=on_device([r.version for r in responses]),
        conversation=Conversation(
            ids=_padded([r.ids for r in responses]).to(device),
            lengths=on_device([len(r.ids) for r in responses]),
            positions=_padded([r.positions for r in responses]).to(device),
            turns=[
                Turns(
                    r.messages,
                    _spans(tokenizer, r),
                    r.environment,
                    r.before_replies,
                    r.sampled,
                    r.tool_calls,
                    r.failed_calls,
                    r.reply_left_out,
                )
                for r in responses
            ],
            environment_seconds=environment_seconds,
            has_tools=has_tools,
        ),
    )


def _spans(tokenizer: PreTrainedTokenizerBase, response: Response) -> list[tuple[int, int]]:
    """Returns the start and end of each reply in the text of the response, in characters."""
    # The text of a part alone may differ: some tokenizers drop a space at its beginning.
    return [
        (
            len(response_text(response.ids[:start], tokenizer)),
            len(response_text(response.ids[:end], tokenizer)),
        )
        for start, end in response.replies
    ]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pads rows of numbers at the end with 0: (n, longest) int64."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded
