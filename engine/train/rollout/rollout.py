"""The responses of a step, with the log-probabilities and values recorded while sampling."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.train.data.prompts import PromptBatch, replace_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.masked import response_mask


@dataclass
class Rollout:
    """The B responses of a step, at most T tokens each, right-padded.

    Every rank holds all rows.
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
    """The responses as text, without special tokens."""
    versions: Tensor | None = None
    """(B,) int64: the step whose update produced the weights that sampled each response. None if
    the backend does not track versions."""

    @property
    def rows(self) -> Tensor:
        """All row indices; (B,) int64, on the host."""
        return torch.arange(len(self.ids))

    @cached_property
    def host_lengths(self) -> Tensor:
        """Lengths of prompts and of responses; (2, B) int64, on the host.

        Copied once, since the host reads them for each micro-batch and would wait for the GPU each
        time.
        """
        return torch.stack([self.batch.lengths, self.lengths]).cpu()

    @property
    def mask(self) -> Tensor:
        """True on response tokens; (B, T) bool."""
        return response_mask(self.lengths, self.ids.shape[1])

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
        )


def replace_rows(rollout: Rollout, rows: Tensor, other: Rollout, other_rows: Tensor) -> Rollout:
    """Returns a rollout with some rows taken from another; both row indices are (n,) int64."""
    width = max(rollout.ids.shape[1], other.ids.shape[1])
    rows, other_rows = rows.to(rollout.ids.device), other_rows.to(rollout.ids.device)

    def replaced(name: str) -> Tensor:
        old, new = getattr(rollout, name), getattr(other, name)
        if old.dim() == 2:
            old, new = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (old, new))
        result: Tensor = old.index_copy(0, rows, new[other_rows])
        return result

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
        str(tokenizer.decode(row[:n], skip_special_tokens=True))
        for row, n in zip(ids[:, :width].tolist(), counts, strict=True)
    ]
    logprobs, entropies, values = floats[:, :, :width].unbind(0)
    return Rollout(batch, ids[:, :width], lengths, eos, ended, logprobs, entropies, values, texts)


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
