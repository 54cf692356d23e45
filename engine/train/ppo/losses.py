"""The losses of PPO as pure functions of tensors: no model, no process group.

Shapes: B responses, T response tokens. A mask is (B, T) bool, true on the sampled tokens up to and
including the one that ended the response. All other tensors are float32. Sums are over the mask.

Sources: Schulman et al. 2017 (PPO); Huang et al. 2024, arXiv 2403.17031, and TRL, OpenRLHF and verl
(implementation details).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on |log ρ|. It keeps exp finite; a ratio of e^20 gets the update skipped anyway."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Log ρ (B, T), clamped to ±20; 0 outside the mask.

    `kind` is `token` for each token's own ratio, or `sequence` for the response's ratio
    π(y|x)/π_old(y|x) on each of its tokens (`ppo.ratio`).
    """
    difference = (logprobs - old_logprobs) * mask
    if kind == "sequence":
        difference = difference.sum(1, keepdim=True) * mask
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True)
class PolicyTerms:
    """Sums over the mask. Divide by the minibatch's token count over all ranks."""

    loss: Tensor
    """Σ max(−Âρ, −Â·clip(ρ)), with gradient."""
    clipped: Tensor
    """Number of tokens whose loss is the clipped term."""
    squared_log_ratio: Tensor
    ratio: Tensor
    squared_ratio: Tensor


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    kind: str = "token",
) -> PolicyTerms:
    """The negated clipped objective (Schulman et al. 2017, eq. 7), summed over response tokens."""
    log_rho = log_ratio(logprobs, old_logprobs, mask, kind)
    rho = log_rho.exp()
    unclipped = -advantages * rho
    clipped = -advantages * rho.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        clipped_tokens = ((clipped > unclipped) & mask).sum()
        squared_log_ratio = (log_rho**2).sum()
        ratio, squared_ratio = (rho * mask).sum(), (rho**2 * mask).sum()
    loss = (torch.maximum(unclipped, clipped) * mask).sum()
    return PolicyTerms(loss, clipped_tokens, squared_log_ratio, ratio, squared_ratio)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Σ 0.5·(V − return)² over the mask, and the number of tokens on which the clip is active.

    With `clip`, each token's loss is the larger of (V − return)² and the same with V clamped to
    V_old ± clip, as in TRL and OpenRLHF. The sum carries the gradient.
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(mask)
    if clip is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        clipped_loss = (clipped_values - returns) ** 2
        clipped = (clipped_loss > loss) & mask
        loss = torch.maximum(loss, clipped_loss)
    return 0.5 * (loss * mask).sum(), clipped.sum()
