"""Corrects for rollouts whose sampling distribution is not exactly that of the policy.

Another engine, or generation in bfloat16, samples from a slightly different distribution μ than the
policy π_old that the trainer computes. The clipped objective divides by π_old, so each token's loss
is weighted by π_old/μ. The weight is not differentiated.

Source: truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
You Off-Policy RL Training"; `token_truncate` and `token_mask` in TRL.
"""

import dataclasses

import torch
from torch import Tensor

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo.advantages import Targets
from engine.train.rollout.rollout import Rollout

TAIL = 0.99
"""The quantile of the gap that is reported beside its mean and its maximum."""


def correction_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, kind: str, cap: float
) -> Tensor:
    """The weight of each token, (B, T) float32; 1 outside the mask.

    Args:
        old_logprobs: (B, T): log π_old, by the trainer.
        rollout_logprobs: (B, T): log μ, by whoever sampled.
        mask: (B, T) bool: the response tokens.
        kind: `truncate` for min(π_old/μ, cap); `mask` for π_old/μ, and 0 where that exceeds cap.
        cap: > 0.
    """
    ratio = ((old_logprobs - rollout_logprobs) * mask).exp()
    if kind == "truncate":
        return ratio.clamp(max=cap)
    return ratio.masked_fill(ratio > cap, 0.0)


def with_rollout_correction(targets: Targets, rollout: Rollout, config: PPOConfig) -> Targets:
    """Adds the weights of `ppo.rollout_correction` to what the epochs train on."""
    if config.rollout_correction == "none":
        return targets
    weights = correction_weights(
        targets.old_logprobs, rollout.logprobs, rollout.mask, config.rollout_correction,
        config.rollout_correction_cap,
    )  # fmt: skip
    return dataclasses.replace(targets, token_weights=weights)


def gap_metrics(targets: Targets, rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """How far the sampling distribution was from π_old, and what the correction did."""
    mask = rollout.mask
    gap = (targets.old_logprobs - rollout.logprobs)[mask].double()
    order = gap.abs().sort().values
    metrics = {
        "val/rollout_logprob_gap": order[-1],
        "val/rollout_logprob_gap_mean": order.mean(),
        "val/rollout_logprob_gap_p99": order[int(TAIL * (len(order) - 1))],
        # Of k3's form: not negative, and small where the two agree.
        "val/rollout_kl": (torch.expm1(gap) - gap).mean(),
    }
    if targets.token_weights is not None:
        capped = gap.exp() > config.rollout_correction_cap
        metrics["policy/rollout_weight"] = targets.token_weights[mask].double().mean()
        metrics["policy/rollout_capped_frac"] = capped.double().mean()
    # Copied together: the host waits once.
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
