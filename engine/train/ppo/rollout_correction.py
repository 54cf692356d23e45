"""Corrects for rollouts sampled from a distribution that differs slightly from the policy.

Another engine, or generation in bfloat16, samples from a distribution μ that differs slightly from
the policy π_old computed by the trainer. Since the policy loss divides by π_old, each token's loss
is weighted by π_old/μ, of the token or of its whole response. No gradient flows through the weight.

Source: truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
You Off-Policy RL Training"; a band of ratios, Ling Team 2025, arXiv 2510.18855 (IcePop);
`token_truncate`, `token_mask`, `sequence_truncate` and `sequence_mask` in TRL; `seq-mask-tis` in
OpenRLHF.
"""

import dataclasses

import torch
from torch import Tensor

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets
from engine.train.rollout.rollout import Rollout

TAIL = 0.99
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
    if kind.startswith("sequence_"):
        bounded_by = difference.sum(1, keepdim=True) * mask
    if kind == "sequence_mean_mask":
        bounded_by = bounded_by / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        difference = bounded_by
    ratio, of_bounds = difference.exp(), bounded_by.exp()
    bounded = ((of_bounds < low) | (of_bounds > high)) & mask
    if kind.endswith("mask"):
        return Correction(ratio.masked_fill(bounded, 0.0), bounded)
    return Correction(torch.where(mask, ratio.clamp(low, high), 1.0), bounded)


def with_rollout_correction(targets: Targets, rollout: Rollout, config: PPOConfig) -> Targets:
    """Adds the weights of `ppo.rollout_correction` to the targets."""
    if config.rollout_correction == "none":
        return targets
    mask = rollout.mask
    weights = correction(targets.old_logprobs, rollout.logprobs, mask, config).weights
    if config.rollout_correction_normalise:
        weights = normalised(weights, mask, config)
    return dataclasses.replace(targets, token_weights=weights)


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
        "val/rollout_logprob_gap_p99": order[int(TAIL * (len(order) - 1))],
        # k3: non-negative, and small where the two agree.
        "val/rollout_kl": (torch.expm1(gap) - gap).mean(),
    }
    if targets.token_weights is not None:
        found = correction(targets.old_logprobs, rollout.logprobs, mask, config)
        metrics["policy/rollout_weight"] = found.weights[mask].double().mean()
        metrics["policy/rollout_capped_frac"] = found.bounded[mask].double().mean()
    # Copied together, so that the host synchronises once.
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
