"""The losses of PPO as pure functions of tensors: no model, no process group.

Shapes: B responses, T response tokens. A mask is (B, T) bool, true on the sampled tokens up to and
including the one that ended the response. All other tensors are float32. Sums are over the mask.

Sources: Schulman et al. 2017 (PPO); Ye et al. 2020, arXiv 1912.09729 (dual clip); Yu et al. 2025,
arXiv 2503.14476 (DAPO: the upper clip range, the token mean); Liu et al. 2025, arXiv 2503.20783
(Dr. GRPO: the constant divisor); Zheng et al. 2025, arXiv 2507.18071 (GSPO: the mean ratio);
MiniMax 2025, arXiv 2506.13585 (CISPO); Gao et al. 2025, arXiv 2511.20347 (SAPO); Shen et al. 2026,
arXiv 2602.10693 (VESPO); Zhao et al. 2025, arXiv 2507.20673 (GMPO); Qi et al. 2026, arXiv
2602.04879 (DPPO); Richemond et al. 2024, arXiv 2405.19107 (DRO); DeepSeek-AI 2025, arXiv 2512.02556
(the off-policy mask); Huang et al. 2024, arXiv 2403.17031, and TRL, OpenRLHF and verl
(implementation details). docs/ppo.md has the formulas.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo.masked import response_means

LOG_RATIO_LIMIT = 20.0
"""Bound on |log ρ|. It keeps exp finite; a ratio of e^20 gets the update skipped anyway."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Log ρ (B, T), clamped to ±20; 0 outside the mask.

    `kind` is the value of `ppo.ratio`: `token` for each token's own ratio; `sequence` for the
    response's ratio π(y|x)/π_old(y|x) on each of its tokens; `sequence_mean` for the geometric mean
    of the response's token ratios.
    """
    difference = (logprobs - old_logprobs) * mask
    if kind == "sequence":
        difference = difference.sum(1, keepdim=True) * mask
    elif kind == "sequence_mean":
        difference = response_means(difference, mask) * mask
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@torch.no_grad()
def off_policy(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, limit: float
) -> Tensor:
    """Selects the tokens that the off-policy mask excludes from the policy loss; (B, T) bool.

    These have a negative advantage, and are in responses that have become so much less likely under
    the policy than when sampled that the mean of log(μ/π) over their tokens exceeds `limit`.

    Args:
        logprobs: log π.
        rollout_logprobs: log μ, from the engine that sampled.
        advantages: Â.
        mask: the response tokens.
        limit: in nats per token.
    """
    distance = response_means(rollout_logprobs - logprobs, mask)
    return (distance > limit) & (advantages < 0) & mask


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of the per-token policy loss; (B, T) each."""

    logprobs: Tensor
    """Log π, with gradient."""
    old_logprobs: Tensor
    rho: Tensor
    """ρ, with gradient."""
    clipped_rho: Tensor
    """ρ clipped to the clip range."""
    advantages: Tensor
    mask: Tensor
    config: PPOConfig


def upper_clip_range(config: PPOConfig) -> float:
    """`ppo.clip_range_high`, or `ppo.clip_range` without it."""
    return config.clip_range if config.clip_range_high is None else config.clip_range_high


@dataclass(frozen=True)
class TokenLosses:
    """The policy loss of each token; (B, T) each."""

    loss: Tensor
    """With gradient."""
    clipped: Tensor | None = None
    """bool: whether the token's ratio is clipped; None if the loss clips nothing."""
    clipped_ratio: Tensor | None = None
    """The ratio that is clipped, if that is not ρ."""


def clipped_objective(x: TokenInputs) -> TokenLosses:
    """PPO's max(−Âρ, −Â·clip(ρ)): a clipped token has no gradient."""
    unclipped, clipped = -x.advantages * x.rho, -x.advantages * x.clipped_rho
    return TokenLosses(torch.maximum(unclipped, clipped), clipped > unclipped)


def cispo(x: TokenInputs) -> TokenLosses:
    """CISPO's −Â·clip(ρ)·log π with clip(ρ) a constant: a clipped token keeps a gradient.

    Where nothing is clipped and ρ is the token's own, the gradient is that of −Âρ.
    """
    clipped = (x.clipped_rho != x.rho) & (x.advantages != 0)
    return TokenLosses(-x.advantages * x.clipped_rho.detach() * x.logprobs, clipped)


def sapo(x: TokenInputs) -> TokenLosses:
    """SAPO's −Â·4/τ·σ(τ·(ρ − 1)): the gradient of −Âρ at ρ = 1, fading smoothly away from there."""
    positive, negative = x.config.sapo_temperature, x.config.sapo_temperature_negative
    tau = torch.where(x.advantages > 0, positive, negative)
    gate = torch.sigmoid(tau * (x.rho - 1)) * 4 / tau
    return TokenLosses(-x.advantages * gate)


def vespo(x: TokenInputs) -> TokenLosses:
    """VESPO's −Â·φ(ρ)·log π with φ(ρ) = ρ^k·exp(λ·(1 − ρ)) a constant, 1 at ρ = 1.

    ρ is the response's.
    """
    config, rho = x.config, x.rho.detach()
    negative = x.advantages < 0
    k = torch.where(negative, config.vespo_k_negative, config.vespo_k)
    lam = torch.where(negative, config.vespo_lambda_negative, config.vespo_lambda)
    weight = (k * rho.log() + lam * (1 - rho)).exp()
    return TokenLosses(-x.advantages * weight * x.logprobs)


def gmpo(x: TokenInputs) -> TokenLosses:
    """GMPO's −Â·exp(mean of the clipped log ρ of the response's tokens), for each of its tokens.

    A token's log ρ is bounded by ε_high where Â > 0 and by −ε where Â < 0, as in the clipped
    objective. A bounded token has no gradient of its own.
    """
    own = log_ratio(x.logprobs, x.old_logprobs, x.mask, "token")
    low, high = own.clamp(min=-x.config.clip_range), own.clamp(max=upper_clip_range(x.config))
    bounded = torch.where(x.advantages > 0, high, torch.where(x.advantages < 0, low, own))
    mean = response_means(bounded, x.mask)
    return TokenLosses(-x.advantages * mean.exp(), bounded != own, own.exp())


def dppo_tv(x: TokenInputs) -> TokenLosses:
    """:func:`within_divergence` of |π − π_old|, the total variation of "this token or another"."""
    with torch.no_grad():
        distance = (x.logprobs.exp() - x.old_logprobs.exp()).abs()
    return within_divergence(x, distance)


def dppo_kl(x: TokenInputs) -> TokenLosses:
    """:func:`within_divergence` of KL(π_old ‖ π), both over "this token or another"."""
    with torch.no_grad():
        # In float64: 1 − p of a likely token would be rounded.
        new, old = x.logprobs.double(), x.old_logprobs.double()
        rest, old_rest = ((-torch.expm1(p)).clamp(min=1e-8) for p in (new, old))
        divergence = old.exp() * (old - new) + old_rest * (old_rest / rest).log()
    return within_divergence(x, divergence)


def within_divergence(x: TokenInputs, divergence: Tensor) -> TokenLosses:
    """DPPO's −Â·min(ρ, cap)·log π, the ratio a constant, or 0 where the policy went too far.

    It went too far where the divergence from π_old is above ε_high and Â > 0 < log ρ, or above ε
    and Â < 0 > log ρ: the gradient would increase it. So unlikely tokens, whose ratios vary most,
    may change by more than with a bound on ratios, likely ones by less.
    """
    up = (x.advantages > 0) & (x.rho > 1) & (divergence > upper_clip_range(x.config))
    down = (x.advantages < 0) & (x.rho < 1) & (divergence > x.config.clip_range)
    weight = x.rho.detach().clamp(max=x.config.dppo_ratio_cap).masked_fill(up | down, 0.0)
    return TokenLosses(-x.advantages * weight * x.logprobs, up | down)


def dro(x: TokenInputs) -> TokenLosses:
    """DRO's −Â·log π + b/2·(log ρ)²: a squared penalty in place of a ratio in the gradient."""
    log_rho = log_ratio(x.logprobs, x.old_logprobs, x.mask, "token")
    penalty = 0.5 * (x.config.dro_beta or 0.0) * log_rho**2
    return TokenLosses(-x.advantages * x.logprobs + penalty)


PolicyLoss = Callable[[TokenInputs], TokenLosses]

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clipped": clipped_objective,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "gmpo": gmpo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "dro": dro,
}
"""Per-token losses by `ppo.policy_loss`.

A loss may depend on other tokens of its response only if `ppo.ratio` does (see
:data:`engine.config.sections.ppo.POLICY_LOSS_RATIOS`): otherwise it is computed for a part of the
tokens at a time.
"""


@dataclass(frozen=True)
class PolicyTerms:
    """Sums over the mask. Divide by the minibatch's token count over all ranks."""

    loss: Tensor
    """Σ w·l, with gradient. l is selected by `ppo.policy_loss`; w is 1 unless rows have weights."""
    clipped_high: Tensor
    """Number of tokens whose ratio is clipped, being above the range."""
    clipped_low: Tensor
    """The same below the range."""
    dual_clipped: Tensor
    """Number of tokens whose loss is the bound of the dual clip."""
    squared_log_ratio: Tensor
    ratio: Tensor
    squared_ratio: Tensor


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PPOConfig,
    row_weights: Tensor | None = None,
) -> PolicyTerms:
    """Computes the policy loss, summed over response tokens.

    By default this is the negated clipped objective (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: log π, with gradient.
        old_logprobs: log π_old.
        advantages: Â.
        mask: the response tokens.
        config: `ratio`, `policy_loss` with its keys, and the clip ranges are read.
        row_weights: (B,), the weight of each response's tokens; see :data:`AGGREGATIONS`.
    """
    log_rho = log_ratio(logprobs, old_logprobs, mask, config.ratio)
    rho = log_rho.exp()
    clipped_rho = rho.clamp(1 - config.clip_range, 1 + upper_clip_range(config))
    inputs = TokenInputs(logprobs, old_logprobs, rho, clipped_rho, advantages, mask, config)
    found = POLICY_LOSSES[config.policy_loss](inputs)
    tokens = found.loss
    dual = torch.zeros_like(mask)
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        dual = (advantages < 0) & (bound < tokens) & mask
        tokens = torch.where(dual, bound, tokens)
    with torch.no_grad():
        clipped = torch.zeros_like(mask) if found.clipped is None else found.clipped & mask
        of = rho if found.clipped_ratio is None else found.clipped_ratio
        clipped_high, clipped_low = (clipped & (of > 1)).sum(), (clipped & (of < 1)).sum()
        squared_log_ratio = (log_rho**2).sum()
        ratio, squared_ratio = (rho * mask).sum(), (rho**2 * mask).sum()
    loss = weighted_sum(tokens, mask, row_weights)
    return PolicyTerms(
        loss, clipped_high, clipped_low, dual.sum(), squared_log_ratio, ratio, squared_ratio
    )


def weighted_sum(x: Tensor, mask: Tensor, row_weights: Tensor | None) -> Tensor:
    """Σ w·x over the mask, a scalar; w is (B,), the weight of each response's tokens, or 1."""
    kept = x * mask
    return (kept if row_weights is None else kept * row_weights[:, None]).sum()


@dataclass(frozen=True)
class MinibatchSize:
    """The size of a minibatch over all ranks; each rank holds some of its rows."""

    tokens: int
    """Number of response tokens."""
    responses: int
    max_new_tokens: int
    """`rollout.max_new_tokens`."""


def token_mean(size: MinibatchSize, lengths: Tensor) -> Tensor | None:
    """The mean over tokens: tokens have equal weight, so longer responses count more."""
    del size, lengths
    return None


def sequence_mean(size: MinibatchSize, lengths: Tensor) -> Tensor | None:
    """The mean over responses of the mean over tokens, as in GRPO (Shao et al. 2024, eq. 3)."""
    return size.tokens / (size.responses * lengths)


def sequence_sum(size: MinibatchSize, lengths: Tensor) -> Tensor | None:
    """The mean over responses of the sum over tokens, as in LUSPO and verl."""
    return torch.full_like(lengths, size.tokens / size.responses, dtype=torch.float32)


def sequence_sum_constant(size: MinibatchSize, lengths: Tensor) -> Tensor | None:
    """The mean over responses of the sum over tokens divided by a constant, the largest length."""
    weight = size.tokens / (size.responses * size.max_new_tokens)
    return torch.full_like(lengths, weight, dtype=torch.float32)


Aggregation = Callable[[MinibatchSize, Tensor], Tensor | None]

AGGREGATIONS: dict[str, Aggregation] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "sequence_sum": sequence_sum,
    "sequence_sum_constant": sequence_sum_constant,
}
"""Aggregations of token losses to a minibatch's policy loss, by `ppo.loss_aggregation`.

Given the lengths (B,), each function returns row weights (B,) for a sum that is divided by the
minibatch's token count; None means weights of 1. So the result does not depend on the number of
ranks or on micro-batches.
"""


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Computes Σ 0.5·(V − return)² over the mask, and the number of tokens with an active clip.

    With `clip`, each token's loss is the larger of (V − return)² and the same with V clamped to
    V_old ± clip, as in TRL and OpenRLHF. The sum carries the gradient.
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(mask)
    if clip is not None:
        # Not `old_values + difference.clamp()`: rounding would change values within the range,
        # which might then count as clipped.
        clipped_values = values.clamp(old_values - clip, old_values + clip)
        clipped_loss = (clipped_values - returns) ** 2
        clipped = (clipped_loss > loss) & mask
        loss = torch.maximum(loss, clipped_loss)
    return 0.5 * (loss * mask).sum(), clipped.sum()
