"""The responses of a step, with the log-probabilities and values recorded while sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.protocol.rank_messages import SampleMessages
from engine.train.data.prompts import PromptBatch, replace_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.masked import response_mask
from engine.train.rollout.conversation import Conversation, replaced_rows

OnEnded = Callable[[int, list[int]], None]
"""Called with row and tokens of a response that has ended while others have not."""


@dataclass
class Rollout:
    """The B responses of a step, at most T tokens each, right-padded.

    Every rank holds all rows. The tokens are those that the policy sampled; with an environment,
    :attr:`conversation` has its replies between them.
    """

    batch: PromptBatch
    ids: Tensor
    """(B, T) int64, 0 beyond the length."""
    lengths: Tensor
    """(B,) int64, at least 1; includes the end-of-sequence token."""
    eos: Tensor
    """(B,) bool: the last token is an end-of-sequence token."""
    ended: Tensor
    """(B,) bool: ended by eos or a stop string; False if truncated at the token limit."""
    logprobs: Tensor
    """(B, T) float32: log π_old of the sampled tokens, at the rollout temperature."""
    entropies: Tensor
    """(B, T) float32: entropy of the full distribution, in nats."""
    values: Tensor
    """(B, T) float32: V before each token; zeros without a value function."""
    texts: list[str]
    """The responses as text, without special tokens; with an environment, its replies, too."""
    versions: Tensor | None = None
    """(B,) int64: the step whose update produced the weights that sampled each response. None if
    the backend does not track versions."""
    conversation: Conversation | None = None
    """The turns of policy and environments; None without an environment."""

    @property
    def rows(self) -> Tensor:
        """All row indices; (B,) int64, on the host."""
        return torch.arange(len(self.ids))

    @cached_property
    def host_lengths(self) -> Tensor:
        """Tokens of the context and of the response; (2, B) int64, on the host.

        The context is the prompt and an environment's replies: all that the policy did not sample.
        Copied once, since the host reads them for each micro-batch and would wait for the GPU each
        time.
        """
        context = self.batch.lengths
        if self.conversation is not None:
            context = context + self.conversation.lengths - self.lengths
        return torch.stack([context, self.lengths]).cpu()

    @property
    def mask(self) -> Tensor:
        """True on response tokens; (B, T) bool."""
        return response_mask(self.lengths, self.ids.shape[1])

    @property
    def sampled_texts(self) -> list[str]:
        """The texts that the policy sampled: one for each turn."""
        if self.conversation is None:
            return self.texts
        return [text for turns in self.conversation.turns for text in turns.sampled]

    def replies(self, row: int) -> list[tuple[int, int]] | None:
        """Start and end of each reply in the text of a response; None without an environment."""
        return None if self.conversation is None else self.conversation.turns[row].replies

    def turn_ends(self, row: int) -> list[int]:
        """For each turn of a response, the number of tokens that were sampled until its end."""
        before = [] if self.conversation is None else self.conversation.turns[row].before_replies
        return [*before, int(self.host_lengths[1, row])]

    def messages(self, row: int) -> SampleMessages | None:
        """A response as messages; None unless it is a conversation with an environment."""
        prompt = self.batch.prompts[row].messages
        if self.conversation is None or prompt is None:
            return None
        return SampleMessages(prompt, self.conversation.turns[row].messages)

    def select(self, rows: Tensor) -> "Rollout":
        """Selects responses by indices on the host; P and T stay the same."""
        return Rollout(
            batch=self.batch.select(rows),
            ids=self.ids[rows],
            lengths=self.lengths[rows],
            eos=self.eos[rows],
            ended=self.ended[rows],
            logprobs=self.logprobs[rows],
            entropies=self.entropies[rows],
            values=self.values[rows],
            texts=[self.texts[i] for i in rows.tolist()],
            versions=None if self.versions is None else self.versions[rows],
            conversation=None if self.conversation is None else self.conversation.select(rows),
        )

    def cpu(self) -> "Rollout":
        """Returns a copy on the host, without the conversation; the prompts stay where they are.

        Makes three copies, since the host waits for a GPU in each.
        """
        each = [self.lengths, self.eos, self.ended]
        each += [] if self.versions is None else [self.versions]
        lengths, eos, ended, *versions = torch.stack([x.long() for x in each]).cpu()
        logprobs, entropies, values = torch.stack(
            [self.logprobs, self.entropies, self.values]
        ).cpu()  # fmt: skip
        return Rollout(
            batch=self.batch,
            ids=self.ids.cpu(),
            lengths=lengths,
            eos=eos.bool(),
            ended=ended.bool(),
            logprobs=logprobs,
            entropies=entropies,
            values=values,
            texts=self.texts,
            versions=versions[0] if versions else None,
        )

    def sequences(self, rows: Tensor, length: int) -> Tensor:
        """Returns the first tokens of prompts with all that follows: (n, length) int64.

        What follows a shorter sequence is arbitrary.

        Args:
            rows: (n,) int64, on the rollout's device.
            length: L.
        """
        after = self.ids if self.conversation is None else self.conversation.ids
        columns = torch.cat([self.batch.ids[rows], after[rows]], 1)
        start = self.batch.ids.shape[1] - self.batch.lengths[rows][:, None]  # left-padded prompts
        index = start + torch.arange(length, device=rows.device)
        return columns.gather(1, index.clamp(max=columns.shape[1] - 1))

    def positions(self, rows: Tensor, width: int) -> Tensor:
        """Returns where the first `width` response tokens stand in :meth:`sequences`; (n, width).

        Positions beyond a response's length are arbitrary.
        """
        first = self.batch.lengths[rows][:, None]
        if self.conversation is None:
            return first + torch.arange(width, device=rows.device)
        return first + self.conversation.positions[rows, :width]


def replace_rows(rollout: Rollout, rows: Tensor, other: Rollout, other_rows: Tensor) -> Rollout:
    """Returns a rollout with some rows taken from another; both row indices are (n,) int64."""
    rows, other_rows = rows.to(rollout.ids.device), other_rows.to(rollout.ids.device)

    def replaced(name: str) -> Tensor:
        return replaced_rows(getattr(rollout, name), rows, getattr(other, name), other_rows)

    texts = list(rollout.texts)
    for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
        texts[row] = other.texts[other_row]
    return Rollout(
        batch=replace_prompts(rollout.batch, rows, other.batch, other_rows),
        ids=replaced("ids"),
        lengths=replaced("lengths"),
        eos=replaced("eos"),
        ended=replaced("ended"),
        logprobs=replaced("logprobs"),
        entropies=replaced("entropies"),
        values=replaced("values"),
        texts=texts,
        versions=None if rollout.versions is None else replaced("versions"),
        conversation=None
        if rollout.conversation is None or other.conversation is None
        else rollout.conversation.replaced(rows, other.conversation, other_rows),
    )


def assemble(
    batch: PromptBatch,
    ids: Tensor,
    lengths: Tensor,
    eos: Tensor,
    ended: Tensor,
    floats: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """Builds a rollout: trims to the longest response and decodes the tokens.

    Args:
        batch: B prompts.
        ids: (B, limit) int64.
        lengths: (B,) int64.
        eos: (B,) bool.
        ended: (B,) bool.
        floats: (3, B, limit) float32: log-probabilities, entropies and values.
        tokenizer: the model's.
    """
    counts = lengths.tolist()
    width = max(counts)
    texts = [
        response_text(row[:n], tokenizer)
        for row, n in zip(ids[:, :width].tolist(), counts, strict=True)
    ]
    logprobs, entropies, values = floats[:, :, :width].unbind(0)
    return Rollout(batch, ids[:, :width], lengths, eos, ended, logprobs, entropies, values, texts)


def response_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def merge_rollouts(
    ranks: RankGroup,
    batch: PromptBatch,
    local: Rollout,
    rows: Tensor,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """Gathers all ranks' responses into one rollout, on every rank.

    Each rank fills its own rows of a zero tensor; the all-reduce sum of these is exact.

    Args:
        ranks: all ranks of this attempt.
        batch: all B prompts.
        local: this rank's n responses.
        rows: their rows in the batch; (n,) int64.
        limit: the maximum number of new tokens.
        tokenizer: the model's.
    """
    if ranks.size == 1:
        return local

    def gathered(x: Tensor, *shape: int) -> Tensor:
        full = torch.zeros(*shape, dtype=x.dtype, device=x.device)
        if x.dim() == 1:
            full[rows] = x
        else:
            full[rows, : x.shape[1]] = x
        return ranks.all_reduce_sum(full)

    count = len(batch.prompts)
    floats = [gathered(x, count, limit) for x in (local.logprobs, local.entropies, local.values)]
    lengths, eos, ended = (gathered(x, count) for x in (local.lengths, local.eos, local.ended))
    ids = gathered(local.ids, count, limit)
    merged = assemble(
        batch.to(local.ids.device), ids, lengths, eos, ended, torch.stack(floats), tokenizer
    )
    if local.versions is not None:
        merged.versions = gathered(local.versions, count)
    return merged


def left_mask(lengths: Tensor, width: int) -> Tensor:
    """Builds the attention mask of left-padded prompts: (B,) lengths → (B, width) int64."""
    return (torch.arange(width, device=lengths.device)[None, :] >= width - lengths[:, None]).long()
