"""Masked reductions over response tokens."""

import torch
from torch import Tensor


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths → (B, width) bool. Masks come from lengths: a token id may mean anything."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over the mask; a scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """X (B, T) with variance 1, and mean 0 if asked, over the mask of the whole batch."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Σ_t (log π − log π_ref): (B,), nats per response, a sampled estimate of the KL."""
    return ((logprobs - ref_logprobs) * mask).sum(1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(return − V)/Var(return) over the mask; NaN where the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(returns - values) / spread, torch.nan)
