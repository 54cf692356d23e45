"""Log-probabilities and values of a rollout, by full forward passes without a cache."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.train.distributed.sharding import with_materialised_model
from engine.train.models.language_model import AnyModel
from engine.train.ppo.logprobs import token_logprobs, token_logprobs_and_entropies
from engine.train.ppo.masked import response_mask
from engine.train.rollout.rollout import ReportProgress, Rollout, left_mask


@dataclass(frozen=True)
class TokenOutputs:
    """What one forward pass computes for the response tokens of n rows; (n, t') float32 each."""

    logprobs: Tensor
    """log π at the temperature; zeros with `want="values"`."""
    values: Tensor | None
    """None without a value function."""
    entropies: Tensor | None
    """Of the distribution at the temperature, in nats; None if not asked for."""

    @property
    def width(self) -> int:
        """t', the length of the longest response."""
        return self.logprobs.shape[1]


def rollout_forward(
    model: AnyModel | nn.Module,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    want: str = "both",
    detach_trunk: bool = False,
    entropies: bool = False,
) -> TokenOutputs:
    """Log-probabilities and values of the response tokens of some rows, by one forward pass.

    The rows are trimmed to their longest prompt and response. The logits and the value of token t
    are outputs at position t − 1, so the last token is not part of the input.

    Args:
        model: the policy, the reference, or the policy wrapped for training.
        rollout: B responses.
        rows: indices into the rollout, on the host; (n,) int64.
        temperature: divides the logits; > 0.
        want: `both`, `logits` or `values`.
        detach_trunk: stop the value's gradient at a trunk that the policy shares.
        entropies: also compute entropies, which costs a pass over the logits.
    """
    prompt_width, width = rollout.host_lengths[:, rows].max(1).values.tolist()
    rows = rows.to(rollout.ids.device)
    prompt_lengths, lengths = rollout.batch.lengths[rows], rollout.lengths[rows]
    prompts = rollout.batch.ids[rows, rollout.batch.ids.shape[1] - prompt_width :]
    responses = rollout.ids[rows, :width]
    tokens = torch.cat([prompts, responses], 1)[:, :-1]
    attention = torch.cat(
        [left_mask(prompt_lengths, prompt_width), response_mask(lengths, width).long()], 1
    )[:, :-1]
    logits, values = model(tokens, attention, width, want=want, detach_trunk=detach_trunk)
    if logits is None or want == "values":
        return TokenOutputs(torch.zeros(responses.shape, device=responses.device), values, None)
    if entropies:
        logprobs, entropy = token_logprobs_and_entropies(logits, responses, temperature)
        return TokenOutputs(logprobs, values, entropy)
    return TokenOutputs(token_logprobs(logits, responses, temperature), values, None)


def by_length(rollout: Rollout, rows: Tensor, size: int) -> list[Tensor]:
    """Splits row indices into micro-batches of `size`, of similar lengths to reduce padding."""
    return list(longest_first(rollout, rows).split(size)) if len(rows) else []


def longest_first(rollout: Rollout, rows: Tensor) -> Tensor:
    """Sorts row indices by response length, then by prompt length, both descending; on the host."""
    prompts, lengths = rollout.host_lengths[:, rows]
    order = lengths * (prompts.max() + 1) + prompts
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
    """Log π and V of a rollout's tokens under a model, without gradients.

    Args:
        model: the policy or the reference.
        rollout: B responses of at most T tokens.
        temperature: divides the logits; > 0.
        size: rows of a micro-batch.
        rows: indices of the rows to compute, (n,) int64 on the host; all when left out.
        want: `both`, `logits` or `values`.
        report: called with (rows done, rows).

    Returns:
        log π and V, each (B, T) float32; 0 beyond a response's length and in other rows.
    """
    logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    rows = rollout.rows if rows is None else rows
    done = 0
    with model.autocast(logprobs.device.type):  # casts weights once for all micro-batches
        for micro in by_length(rollout, rows, size):
            outputs = rollout_forward(model, rollout, micro, temperature, want=want)
            there = micro.to(logprobs.device)
            logprobs[there, : outputs.width] = outputs.logprobs
            if outputs.values is not None:
                values[there, : outputs.width] = outputs.values
            done += len(micro)
            report(done, len(rows))
    mask = rollout.mask
    return logprobs * mask, values * mask
