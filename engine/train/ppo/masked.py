"""Masked reductions over response tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

GROUP_STD_EPS = 1e-4
"""Added to the standard deviation of a group's scores or returns before dividing by it, as in TRL:
where they do not vary, the quotients are 0."""


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """True on the first `lengths` tokens of each row: (B,) int64 → (B, width) bool.

    Masks are made from lengths, never from token ids: the pad token may be part of a response.
    """
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over the mask (B, T); a scalar."""
    return (x * mask).sum() / mask.sum()


def response_means(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over each row of the mask (B, T), 0 if that is empty; (B, 1)."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """The variance of x (B, T) over the mask (B, T), divided by its size; a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def statistics(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The `mean`, `std` (divided by n), `min` and `max` of x (B, T) over the mask; scalars."""
    wide = x.double()  # see whiten
    return {
        "mean": masked_mean(wide, mask),
        "std": masked_variance(wide, mask).sqrt(),
        # Indexing by the mask would synchronise with the GPU.
        "min": x.masked_fill(~mask, torch.inf).min(),
        "max": x.masked_fill(~mask, -torch.inf).max(),
    }


def centre(x: Tensor, mask: Tensor) -> Tensor:
    """Shifts x (B, T) to mean 0 over the mask; 0 outside it."""
    wide = x.double()  # see whiten
    return ((wide - masked_mean(wide, mask)) * mask).to(x.dtype)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scales x (B, T) to variance 1 over the mask, and shifts it to mean 0.

    With `shift_mean=False` the mean is kept. The result is 0 outside the mask. As in
    lm-human-preferences, 1e-8 is added to the variance, and its denominator is the number of tokens
    (one less in TRL).
    """
    # In float32 the mean of equal numbers is inexact: 1,000 times 100.7 would be whitened to 0.2.
    wide = x.double()
    mean = masked_mean(wide, mask)
    whitened = (wide - mean) * torch.rsqrt(masked_variance(wide, mask) + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(x.dtype)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Σ_t (log π − log π_ref): (B, T) → (B,), in nats per response.

    This is the single-sample estimate of the KL (k1 in Schulman 2020, "Approximating KL
    divergence"). It is unbiased, and may be negative for a response.
    """
    return ((logprobs - ref_logprobs) * mask).sum(1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(return − V)/Var(return) over the mask, a scalar; NaN if the returns are constant."""
    wide = returns.double()  # see whiten
    total = masked_variance(wide, mask)
    unexplained = masked_variance(wide - values, mask)
    return torch.where(total > 0, 1 - unexplained / total, torch.nan)


def as_float64(scalars: Iterable[Tensor]) -> Tensor:
    """Stacks scalars of any dtype, (n,) float64, so that reading them takes one synchronisation."""
    return torch.stack([x.double() for x in scalars])
