"""A step's answers, and their log-probabilities and values under a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.data.prompts import PromptBatch
from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.masked import response_mask

ReportProgress = Callable[[int, int], None]
"""Takes (done, total)."""


@dataclass
class Rollout:
    """A step's answers; B responses of at most T tokens, right-padded. Not sharded: all of it."""

    batch: PromptBatch
    ids: Tensor
    """(B, T) int64, 0 beyond the length."""
    lengths: Tensor
    """(B,) int64, at least 1; the end-of-sequence token counts."""
    eos: Tensor
    """(B,) bool: the last token is an end of sequence."""
    ended: Tensor
    """(B,) bool: by eos or a stop string, rather than cut off."""
    logprobs: Tensor
    """(B, T) float32: log π_old of the sampled tokens, at the rollout's temperature."""
    entropies: Tensor
    """(B, T) float32: entropy of the whole distribution, nats."""
    values: Tensor
    """(B, T) float32: V before each token; zeros without a value function."""
    texts: list[str]
    """The answers, special tokens left out."""

    @property
    def rows(self) -> Tensor:
        """(B,) int64: every row's number."""
        return torch.arange(len(self.ids), device=self.ids.device)

    @property
    def mask(self) -> Tensor:
        """(B, T) bool."""
        return response_mask(self.lengths, self.ids.shape[1])

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the answers; the widths stay."""
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
    """Trims to the longest answer and reads the tokens as text; floats is (3, B, limit)."""
    width = int(lengths.max())
    texts = [
        str(tokenizer.decode(row[:n], skip_special_tokens=True))
        for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
    logprobs, entropies, values = floats[:, :, :width].unbind(0)
    return Rollout(batch, ids[:, :width], lengths, eos, ended, logprobs, entropies, values, texts)


def merge_rollouts(
    ranks: RankGroup,
    batch: PromptBatch,
    part: Rollout,
    own: Tensor,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """The whole batch's answers on every rank, from what each rank wrote.

    Args:
        ranks: all ranks of this attempt.
        batch: all B prompts.
        part: this rank's answers.
        own: their rows in the batch; (n,) int64.
        limit: of new tokens.
        tokenizer: the model's.
    """
    if ranks.size == 1:
        return part

    def spread(x: Tensor, *shape: int) -> Tensor:
        whole = torch.zeros(*shape, dtype=x.dtype, device=x.device)
        if x.dim() == 1:
            whole[own] = x
        else:
            whole[own, : x.shape[1]] = x
        return ranks.all_reduce_sum(whole)

    count = len(batch.prompts)
    floats = [spread(x, count, limit) for x in (part.logprobs, part.entropies, part.values)]
    lengths, eos, ended = (spread(x, count) for x in (part.lengths, part.eos, part.ended))
    ids = spread(part.ids, count, limit)
    return assemble(
        batch.to(part.ids.device), ids, lengths, eos, ended, torch.stack(floats), tokenizer
    )


def left_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) int64 attention mask of left-padded prompts."""
    return (torch.arange(width, device=lengths.device)[None, :] >= width - lengths[:, None]).long()
