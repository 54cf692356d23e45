"""Adapts the weight of the entropy bonus to hold the policy's entropy (`ppo.entropy_target`).

Source: He et al. 2025 (Skywork-OR1), arXiv 2505.22312; `use_adaptive_entropy` in TRL.
"""

import math

import msgspec

from engine.config.sections.ppo import PPOConfig


class EntropyBonus(msgspec.Struct, frozen=True, kw_only=True):
    """The weight of the entropy bonus as adapted so far."""

    weight: float
    began: float
    """The `ppo.entropy_coef` at which it began."""


def adapt(bonus: EntropyBonus | None, entropy: float, config: PPOConfig) -> EntropyBonus:
    """Returns the weight of a step with this entropy.

    It rises by `ppo.entropy_coef_step` if the entropy is below the target, else it falls by as
    much, within [0, `ppo.entropy_coef_max`]. It begins at `ppo.entropy_coef`, again if an operator
    changes that.

    Args:
        bonus: that of the step before; None at the beginning.
        entropy: mean entropy of the step's response tokens, in nats.
        config: in force for the step, with `entropy_target`.
    """
    target, began = config.entropy_target, config.entropy_coef
    weight = bonus.weight if bonus is not None and bonus.began == began else began
    if target is not None and math.isfinite(entropy):
        weight += config.entropy_coef_step if entropy < target else -config.entropy_coef_step
    return EntropyBonus(weight=min(max(weight, 0.0), config.entropy_coef_max), began=began)


def with_weight(config: PPOConfig, bonus: EntropyBonus, entropy: float) -> PPOConfig:
    """Returns the configuration with the weight that a step's loss uses.

    It is 0 if the entropy is not below the target.
    """
    below = config.entropy_target is not None and entropy < config.entropy_target
    return msgspec.structs.replace(config, entropy_coef=bonus.weight if below else 0.0)
