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


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, beta: float
) -> Tensor:
    """−β(log π − log π_ref) on every token, plus the score (B,) on the last one; (B, T).

    The last response token carries the score (OpenRLHF `compute_reward`, DeepSpeed-Chat), not the
    padding after it.
    """
    mask = response_mask(lengths, logprobs.shape[1])
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = (lengths - 1)[:, None]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16) backwards over the response; (B, T).

    The value after the last token is 0. A masked token leaves the accumulators as they are, so a
    gap inside a response neither cuts the sum nor counts as a step.
    """
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(carried)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, carried, 0.0)
    return advantages


def leave_one_out(returns: Tensor, per_prompt: int) -> Tensor:
    """RLOO: each return (B,) minus the mean of the others of its prompt.

    Answers to one prompt lie next to each other, `per_prompt` at a time.
    """
    groups = returns.view(-1, per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (per_prompt - 1)
    return (groups - others).view(-1)


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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(return − V)/Var(return) over the mask; NaN where the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(returns - values) / spread, torch.nan)
