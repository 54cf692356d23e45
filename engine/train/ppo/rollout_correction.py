"""Corrects for rollouts sampled from a distribution that differs slightly from the policy.

Another engine, or generation in bfloat16, samples from a distribution μ that differs slightly from
the policy π_old computed by the trainer. Since the policy loss divides by π_old, each token's loss
is weighted by π_old/μ, of the token or of its whole response. No gradient flows through the weight.
Tokens or responses for which the two are too far apart can be left out as well.

Source: truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
You Off-Policy RL Training"; a band of ratios, Ling Team 2025, arXiv 2510.18855 (IcePop);
`token_truncate`, `token_mask`, `sequence_truncate` and `sequence_mask` in TRL; `seq-mask-tis` in
OpenRLHF; rejection by an estimate of the KL, Liu, Li et al. 2025, "When Speed Kills Stability:
Demystifying RL Collapse from the Training-Inference Mismatch", and `rollout_rs` in verl.
"""

import dataclasses
import math

import torch
from torch import Tensor

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets
from engine.train.ppo.kl_estimators import KL_ESTIMATORS
from engine.train.rollout.rollout import Rollout

TAIL_QUANTILE = 0.99
"""The quantile of the gap that is reported in addition to its mean and maximum."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """Importance weights of tokens, (B, T) each; 1 and false outside the mask."""

    weights: Tensor
    """float32."""
    bounded: Tensor
    """bool: whether π_old/μ was beyond a bound."""


def correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: PPOConfig
) -> Correction:
    """Computes the weights by `ppo.rollout_correction`, which must not be `none`.

    Args:
        old_logprobs: (B, T): log π_old, by the trainer.
        rollout_logprobs: (B, T): log μ, by the engine that sampled.
        mask: (B, T) bool: the response tokens.
        config: the kind and the bounds.
    """
    kind = config.rollout_correction
    low, high = config.rollout_correction_floor, config.rollout_correction_cap
    difference = (old_logprobs - rollout_logprobs) * mask
    bounded_by = difference
    if kind == "sequence_mean_mask":
        bounded_by = masked.response_means(difference, mask) * mask
    elif kind.startswith("sequence_"):
        difference = bounded_by = difference.sum(1, keepdim=True) * mask
    ratio, of_bounds = difference.exp(), bounded_by.exp()
    bounded = ((of_bounds < low) | (of_bounds > high)) & mask
    if kind.endswith("mask"):
        return Correction(ratio.masked_fill(bounded, 0.0), bounded)
    return Correction(torch.where(mask, ratio.clamp(low, high), 1.0), bounded)


def with_rollout_correction(targets: Targets, rollout: Rollout, config: PPOConfig) -> Targets:
    """Adds the weights of `ppo.rollout_correction` and `ppo.rollout_rejection` to the targets."""
    mask, weights = rollout.mask, targets.token_weights
    if config.rollout_correction != "none":
        weights = correction(targets.old_logprobs, rollout.logprobs, mask, config).weights
        if config.rollout_correction_normalise:
            weights = normalised(weights, mask, config)
    if config.rollout_rejection != "none":
        out = rejected(targets.old_logprobs, rollout.logprobs, mask, config)
        weights = torch.ones_like(rollout.logprobs) if weights is None else weights
        weights = weights.masked_fill(out, 0.0)
    return dataclasses.replace(targets, token_weights=weights)


def rejected(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: PPOConfig
) -> Tensor:
    """Selects the tokens that `ppo.rollout_rejection` leaves out; (B, T) bool.

    Those are tokens at which the estimate of KL(μ ‖ π_old) exceeds the limit, or all of a response
    whose mean, sum or maximum of it does.

    Args:
        old_logprobs: (B, T): log π_old, by the trainer.
        rollout_logprobs: (B, T): log μ, by the engine that sampled.
        mask: (B, T) bool: the response tokens.
        config: the kind, which must not be `none`, and the limit.
    """
    over, _, estimator = config.rollout_rejection.rpartition("_")
    found = KL_ESTIMATORS[estimator]((rollout_logprobs - old_logprobs) * mask)
    match over:
        case "sequence_mean":
            found = masked.response_means(found, mask)
        case "sequence_sum":
            found = found.sum(1, keepdim=True)
        case "sequence_max":
            found = found.amax(1, keepdim=True)
    return (found > (config.rollout_rejection_limit or math.inf)) & mask


def normalised(weights: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    """Divides weights (B, T) by their mean over tokens, or over responses if they have one each.

    Unchanged if all are 0. As `rollout_is_batch_normalize` in verl.
    """
    mean = masked.masked_mean(weights, mask)
    if config.rollout_correction in ("sequence_truncate", "sequence_mask"):
        mean = weights[:, 0].mean()  # a response has at least one token
    return torch.where(mean > 0, weights / mean.clamp(min=1e-8), weights)


def gap_metrics(targets: Targets, rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """Measures the gap between the sampling distribution and π_old, and the correction's effect."""
    mask = rollout.mask
    gap = (targets.old_logprobs - rollout.logprobs)[mask].double()
    order = gap.abs().sort().values
    metrics = {
        "val/rollout_logprob_gap": order[-1],
        "val/rollout_logprob_gap_mean": order.mean(),
        "val/rollout_logprob_gap_p99": order[int(TAIL_QUANTILE * (len(order) - 1))],
        # k3: non-negative, and small where the two agree.
        "val/rollout_kl": (torch.expm1(gap) - gap).mean(),
    }
    if config.rollout_rejection != "none":
        out = rejected(targets.old_logprobs, rollout.logprobs, mask, config)
        metrics["policy/rollout_rejected_frac"] = out[mask].double().mean()
    if config.rollout_correction != "none":
        found = correction(targets.old_logprobs, rollout.logprobs, mask, config)
        metrics["policy/rollout_weight"] = found.weights[mask].double().mean()
        metrics["policy/rollout_capped_frac"] = found.bounded[mask].double().mean()
    # Copied together, so that the host synchronises once.
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
