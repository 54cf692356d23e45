"""The mathematics of PPO, pure: tensors in, tensors out, no model, no process group.

Shapes: B responses, T response tokens. A *mask* (B, T), bool, is true on the sampled tokens up to
and including the one that ended the answer. Everything is float32. Every mean is over the mask.

Sources: Schulman et al. 2016 (GAE) and 2017 (PPO); Ziegler et al. 2019 (the KL in the reward);
Ahmadian et al. 2024 (RLOO); Huang et al. 2024, arXiv 2403.17031 (details).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""|log ρ| beyond this is held there: e^20 already says that the update must be skipped."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Log ρ (B, T), held to ±20, 0 outside the mask.

    `token`: each token's own. `sequence`: the whole response's, on each of its tokens.
    """
    difference = (logprobs - old_logprobs) * mask
    if kind == "sequence":
        difference = difference.sum(1, keepdim=True) * mask
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True)
class PolicyTerms:
    """Sums over the mask; divide by the optimiser step's global token count."""

    loss: Tensor
    """Σ max(−Âρ, −Â·clip(ρ)); carries the gradient."""
    clipped: Tensor
    """Tokens on which the clip decided."""
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
    """The clipped objective (Schulman et al. 2017, eq. 7), summed over response tokens."""
    log_rho = log_ratio(logprobs, old_logprobs, mask, kind)
    rho = log_rho.exp()
    plain = -advantages * rho
    clipped = -advantages * rho.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        decided = ((clipped > plain) & mask).sum()
        squared_log_ratio = (log_rho**2).sum()
        ratio, squared_ratio = (rho * mask).sum(), (rho**2 * mask).sum()
    loss = (torch.maximum(plain, clipped) * mask).sum()
    return PolicyTerms(loss, decided, squared_log_ratio, ratio, squared_ratio)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Σ 0.5·(V − return)² over the mask, and on how many tokens the value clip decided.

    With `clip`, the larger of that and the same for V held to V_old ± clip (as TRL, OpenRLHF).
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(mask)
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        held_loss = (held - returns) ** 2
        clipped = (held_loss > loss) & mask
        loss = torch.maximum(loss, held_loss)
    return 0.5 * (loss * mask).sum(), clipped.sum()
