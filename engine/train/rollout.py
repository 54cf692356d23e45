"""A step's answers, and their log-probabilities and values under a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.train.data import PromptBatch
from engine.train.logprobs import token_logprobs
from engine.train.models import AnyModel
from engine.train.parallel import Team
from engine.train.ppo import response_mask
from engine.train.sharding import with_model_at_hand

Report = Callable[[int, int], None]
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
    team: Team,
    batch: PromptBatch,
    part: Rollout,
    own: Tensor,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """The whole batch's answers on every rank, from what each rank wrote.

    Args:
        team: the ranks.
        batch: all B prompts.
        part: this rank's answers.
        own: their rows in the batch; (n,) int64.
        limit: of new tokens.
        tokenizer: the model's.
    """
    if team.size == 1:
        return part

    def spread(x: Tensor, *shape: int) -> Tensor:
        whole = torch.zeros(*shape, dtype=x.dtype, device=x.device)
        if x.dim() == 1:
            whole[own] = x
        else:
            whole[own, : x.shape[1]] = x
        return team.merge(whole)

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


def rollout_forward(
    model: AnyModel | nn.Module,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    want: str = "both",
    detach_trunk: bool = False,
) -> tuple[Tensor, Tensor | None, int]:
    """Log-probabilities and values of some answers' tokens by one full forward pass.

    The rows are trimmed to their longest prompt and answer. Logits and value of token t come from
    position t − 1, so the last token is not fed at all.

    Returns:
        log π (n, t') float32 at the temperature (zeros if only values are wanted), values (n, t')
        float32 (None without a value function), and t'.
    """
    prompt_lengths, lengths = rollout.batch.lengths[rows], rollout.lengths[rows]
    prompt_width, width = int(prompt_lengths.max()), int(lengths.max())
    prompts = rollout.batch.ids[rows, rollout.batch.ids.shape[1] - prompt_width :]
    answers = rollout.ids[rows, :width]
    tokens = torch.cat([prompts, answers], 1)[:, :-1]
    attention = torch.cat(
        [left_mask(prompt_lengths, prompt_width), response_mask(lengths, width).long()], 1
    )[:, :-1]
    logits, values = model(tokens, attention, width, want=want, detach_trunk=detach_trunk)
    if logits is None or want == "values":
        return torch.zeros(answers.shape, device=answers.device), values, width
    return token_logprobs(logits, answers, temperature), values, width


def by_length(rollout: Rollout, rows: Tensor, size: int) -> list[Tensor]:
    """Row numbers in micro-batches of `size`, like lengths together, so that little is padding."""
    return list(longest_first(rollout, rows).split(size)) if len(rows) else []


def longest_first(rollout: Rollout, rows: Tensor) -> Tensor:
    """Row numbers in order of length: by answer, then by prompt."""
    prompts = rollout.batch.lengths[rows]
    order = rollout.lengths[rows] * (prompts.max() + 1) + prompts
    return rows[order.argsort(descending=True, stable=True)]


@torch.no_grad()
@with_model_at_hand
def score_tokens(
    model: AnyModel,
    rollout: Rollout,
    temperature: float,
    size: int,
    *,
    rows: Tensor | None = None,
    want: str = "both",
    report: Report = lambda _done, _total: None,
) -> tuple[Tensor, Tensor]:
    """Log π and V of a rollout under a model; each (B, T) float32, 0 beyond the length.

    Where only some `rows` are asked for the others' are 0.
    """
    logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    asked = rollout.rows if rows is None else rows
    done = 0
    for micro in by_length(rollout, asked, size):
        got, value, width = rollout_forward(model, rollout, micro, temperature, want=want)
        logprobs[micro, :width] = got
        if value is not None:
            values[micro, :width] = value
        done += len(micro)
        report(done, len(asked))
    mask = rollout.mask
    return logprobs * mask, values * mask
