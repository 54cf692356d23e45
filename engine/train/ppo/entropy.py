"""Keeps the policy's entropy from falling: an adapted bonus, and tokens of high covariance.

`ppo.entropy_target` adapts the weight of the entropy bonus.

To first order, a policy-gradient step changes the entropy by minus the covariance of log π and the
advantage, and few tokens have nearly all of it. `ppo.clip_cov` leaves some of them out of the
policy loss, `ppo.kl_cov` holds their probabilities back. The published code selects tokens by the
means of a micro-batch, and again in each update. Here they are selected once, over all of a step's
tokens and by π_old, which is the policy of the first update. So the selection depends neither on
micro-batches nor on the number of ranks.

Sources: He et al. 2025 (Skywork-OR1), arXiv 2505.22312, and `use_adaptive_entropy` in TRL; Cui et
al. 2025, arXiv 2505.22617, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models", and `clip_cov` and `kl_cov` in verl.
"""

import dataclasses
import math

import msgspec
import torch
from torch import Tensor

from engine.config.sections.ppo import PPOConfig
from engine.train.data.randomness import permutation
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets


class EntropyBonus(msgspec.Struct, frozen=True, kw_only=True):
    """The weight of the entropy bonus as adapted so far."""

    weight: float
    began: float
    """The `ppo.entropy_coef` at which it began."""


def adapt(bonus: EntropyBonus | None, entropy: float, config: PPOConfig) -> EntropyBonus:
    """Returns the weight of a step with this entropy.

    It rises by `ppo.entropy_coef_step` if the entropy is below the target, else it falls by as
    much, within [`ppo.entropy_coef_min`, `ppo.entropy_coef_max`]. It begins at `ppo.entropy_coef`,
    again if an operator changes that.

    Args:
        bonus: that of the step before; None at the beginning.
        entropy: mean entropy of the step's response tokens, in nats.
        config: in force for the step, with `entropy_target`.
    """
    target, began = config.entropy_target, config.entropy_coef
    weight = bonus.weight if bonus is not None and bonus.began == began else began
    if target is not None and math.isfinite(entropy):
        weight += config.entropy_coef_step if entropy < target else -config.entropy_coef_step
    weight = min(max(weight, config.entropy_coef_min), config.entropy_coef_max)
    return EntropyBonus(weight=weight, began=began)


def with_weight(config: PPOConfig, bonus: EntropyBonus, entropy: float) -> PPOConfig:
    """Returns the configuration with the weight that a step's loss uses.

    It is 0 if the entropy is not below the target.
    """
    below = config.entropy_target is not None and entropy < config.entropy_target
    return msgspec.structs.replace(config, entropy_coef=bonus.weight if below else 0.0)


def with_covariance(
    targets: Targets, mask: Tensor, config: PPOConfig, *, seed: int, step: int
) -> Targets:
    """Applies `ppo.clip_cov` to the advantages, and selects the tokens of `ppo.kl_cov`.

    Args:
        targets: of the whole global batch.
        mask: the response tokens.
        config: the shares and the range.
        seed: with `step`, determines which tokens of the range are left out.
        step: from 1.
    """
    if config.clip_cov:
        found = covariance(targets.advantages, targets.old_logprobs, mask)
        chosen = clipped_tokens(found, mask, config, seed=seed, step=step)
        return dataclasses.replace(targets, advantages=targets.advantages.masked_fill(chosen, 0.0))
    if config.kl_cov:
        found = covariance(targets.advantages, targets.old_logprobs, mask)
        return dataclasses.replace(targets, held_back=top_tokens(found, mask, config.kl_cov))
    return targets


def covariance(advantages: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """(A − mean A)·(log π − mean log π) of each token, the means over the mask; (B, T) float64."""
    a, p = advantages.double(), logprobs.double()
    return (a - masked.masked_mean(a, mask)) * (p - masked.masked_mean(p, mask))


def clipped_tokens(
    covariances: Tensor, mask: Tensor, config: PPOConfig, *, seed: int, step: int
) -> Tensor:
    """Selects `ppo.clip_cov` of all tokens at random from those in the range; (B, T) bool."""
    low, high = config.clip_cov_range
    candidates = ((covariances > low) & (covariances < high) & mask).flatten().nonzero().squeeze(1)
    order = permutation(seed, "clip_cov", (step,), len(candidates)).to(candidates.device)
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[candidates[order[: _count(config.clip_cov, mask)]]] = True
    return chosen


def top_tokens(covariances: Tensor, mask: Tensor, share: float) -> Tensor:
    """Selects the share of the tokens with the highest covariances, if positive; (B, T) bool.

    Tokens that tie with the lowest of them are selected, too.
    """
    least = covariances[mask].sort(descending=True).values[_count(share, mask) - 1]
    return (covariances >= least) & (covariances > 0) & mask


def _count(share: float, mask: Tensor) -> int:
    """At least 1, as in the published code."""
    return max(1, int(share * int(mask.sum())))
