"""Log-probabilities and values of a rollout by full forward passes."""

import torch
from torch import Tensor, nn

from engine.train.distributed.sharding import with_materialised_model
from engine.train.models.language_model import AnyModel
from engine.train.ppo.logprobs import token_logprobs
from engine.train.ppo.masked import response_mask
from engine.train.rollout.rollout import ReportProgress, Rollout, left_mask


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
@with_materialised_model
def score_tokens(
    model: AnyModel,
    rollout: Rollout,
    temperature: float,
    size: int,
    *,
    rows: Tensor | None = None,
    want: str = "both",
    report: ReportProgress = lambda _done, _total: None,
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
