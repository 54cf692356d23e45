"""Rules between the keys of `ppo`, `kl` and the batch."""

from engine.config.schema import RunConfig
from engine.config.sections.ppo import LOSSES_BY_RATIO, POLICY_LOSS_RATIOS, PPOConfig
from engine.errors import ConfigError
from engine.kl import horizon_for, largest_change


def check_ppo(config: RunConfig) -> None:
    """Checks batches, the objective and the KL controller.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    _check_batches(config)
    _check_objective(config)
    _check_policy_loss(config)
    _check_token_weights(config.ppo)
    _check_token_selection(config.ppo)
    _check_value(config)
    if config.reward.in_groups:
        _check_scores_in_groups(config)
    _check_controller(config)


def _check_batches(config: RunConfig) -> None:
    batch, per_prompt = config.rollout.batch_size, config.responses_per_prompt
    traits = config.ppo.traits
    if per_prompt < traits.least_per_prompt:
        raise ConfigError(
            f"rollout.per_prompt must be at least {traits.least_per_prompt} for "
            f"ppo.advantage: {config.ppo.advantage}"
        )
    if batch % per_prompt:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of rollout.per_prompt ({per_prompt})"
        )
    if batch % config.ppo.minibatches:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of "
            f"ppo.minibatches ({config.ppo.minibatches})"
        )
    if config.rollout.dynamic and per_prompt < 2:
        raise ConfigError(
            "rollout.dynamic needs a rollout.per_prompt of at least 2: one response has no variance"
        )
    if config.reward.overlong.buffer > config.rollout.max_new_tokens:
        raise ConfigError(
            f"reward.overlong.buffer ({config.reward.overlong.buffer}) must be at "
            f"most rollout.max_new_tokens ({config.rollout.max_new_tokens})"
        )
    if batch < 2 and traits.baseline and config.ppo.baseline == "batch":
        raise ConfigError("ppo.baseline: batch needs a rollout.batch_size of at least 2")


def _check_objective(config: RunConfig) -> None:
    kl, ppo = config.kl, config.ppo
    if kl.place == "loss" and kl.estimator == "k1" and not kl.importance_weighted:
        raise ConfigError(
            "kl.place: loss needs kl.estimator: k2, k3 or abs (or kl.importance_weighted), because "
            "the gradient of k1 is zero in expectation and would not hold the policy back"
        )
    if kl.importance_weighted and kl.place != "loss":
        raise ConfigError("kl.importance_weighted has no effect without kl.place: loss")
    if not ppo.entropy_coef_min < ppo.entropy_coef_max:
        raise ConfigError(
            f"ppo.entropy_coef_min ({ppo.entropy_coef_min:g}) must be below ppo.entropy_coef_max "
            f"({ppo.entropy_coef_max:g})"
        )
    if not ppo.whiten_scale and ppo.whiten is False:
        raise ConfigError("ppo.whiten_scale: false has no effect without ppo.whiten: leave it out")
    if kl.reference_update.every and config.lora.rank is not None:
        raise ConfigError(
            "kl.reference_update cannot be combined with lora.rank: the reference is the policy "
            "without its adapters"
        )


def _check_policy_loss(config: RunConfig) -> None:
    ppo = config.ppo
    loss, needed = ppo.policy_loss, POLICY_LOSS_RATIOS.get(ppo.policy_loss, ppo.ratio)
    clips = (ppo.dual_clip, ppo.clip_range_high) != (None, None)
    if loss in ("sapo", "vespo", "dro") and clips:
        raise ConfigError(
            "ppo.dual_clip and ppo.clip_range_high have no effect with ppo.policy_loss: "
            f"{loss}, which clips nothing: leave them out"
        )
    if loss != "clipped" and ppo.dual_clip is not None:
        raise ConfigError(
            f"ppo.dual_clip has no effect with ppo.policy_loss: {loss}, which has other bounds: "
            "leave it out"
        )
    if ppo.ratio != needed:
        raise ConfigError(
            f"ppo.policy_loss: {loss} is not defined for ppo.ratio: {ppo.ratio}: set ppo.ratio: "
            f"{needed}"
        )
    if (loss == "dro") != (ppo.dro_beta is not None):
        raise ConfigError(
            "ppo.policy_loss: dro and ppo.dro_beta, the weight of its penalty, need each other"
        )


def _check_token_weights(ppo: PPOConfig) -> None:
    """Checks the keys that leave tokens out of the policy loss, or weight them."""
    if (ppo.rollout_rejection != "none") != (ppo.rollout_rejection_limit is not None):
        raise ConfigError("ppo.rollout_rejection and ppo.rollout_rejection_limit need each other")
    if ppo.rollout_correction_normalise and ppo.rollout_correction == "none":
        raise ConfigError("ppo.rollout_correction_normalise needs ppo.rollout_correction")
    if ppo.clip_cov and ppo.kl_cov:
        raise ConfigError("ppo.clip_cov and ppo.kl_cov are alternatives: leave one of them out")
    if not ppo.clip_cov_range[0] < ppo.clip_cov_range[1]:
        low, high = ppo.clip_cov_range
        raise ConfigError(f"ppo.clip_cov_range must rise: {low:g} is not below {high:g}")


def _check_token_selection(ppo: PPOConfig) -> None:
    """Checks that leaving out single tokens has an effect.

    In a loss whose gradient passes through a ratio of the whole response, a token's loss has a
    gradient for every token of the response: leaving it out only makes the response count less.
    """
    if ppo.ratio == "token" or ppo.policy_loss not in LOSSES_BY_RATIO:
        return
    selecting = {
        "ppo.top_entropy": ppo.top_entropy < 1,
        "ppo.clip_cov": ppo.clip_cov > 0,
        "ppo.rollout_correction: mask": ppo.rollout_correction == "mask",
        f"ppo.rollout_rejection: {ppo.rollout_rejection}": "token" in ppo.rollout_rejection,
    }
    for key, given in selecting.items():
        if given:
            raise ConfigError(
                f"{key} cannot leave out single tokens with ppo.ratio: {ppo.ratio}, whose gradient "
                "is that of the whole response: leave one of them out"
            )


def _check_scores_in_groups(config: RunConfig) -> None:
    given, traits = "normalise: group of a reward source", config.ppo.traits
    if config.responses_per_prompt < 2:
        raise ConfigError(
            f"{given} needs a rollout.per_prompt of at least 2: one response has no deviation"
        )
    if traits.value_function or traits.greedy_baseline:
        what = "value function" if traits.value_function else "greedy baseline"
        raise ConfigError(
            f"{given} cannot be combined with the {what} of ppo.advantage: {config.ppo.advantage}, "
            "which is of a single response: set grpo, for instance"
        )
    for key, plain in (("normalise", "none"), ("clip", None)):
        if getattr(config.reward, key) != plain:
            raise ConfigError(
                f"reward.{key} cannot be combined with {given}, which already limits the scores: "
                "leave it out"
            )


def _check_value(config: RunConfig) -> None:
    ppo = config.ppo
    separate = ppo.traits.value_function and config.model.value == "separate"
    if ppo.value_max_grad_norm is not None and not separate:
        raise ConfigError(
            "ppo.value_max_grad_norm needs model.value: separate: other value functions are "
            "clipped with the policy, or not trained by gradients"
        )
    if ppo.value_rate != 1 and not separate:
        raise ConfigError(
            "ppo.value_rate needs model.value: separate: other value functions have no transformer "
            "of their own; ppo.value_head_rate is that of the head"
        )
    if ppo.value_init == "reward_model":
        _check_value_init(config)
    if config.linear_value:
        _check_linear_value(config)


def _check_value_init(config: RunConfig) -> None:
    if not config.ppo.traits.value_function:
        raise ConfigError(
            f"ppo.value_init: reward_model needs a value function, and ppo.advantage: "
            f"{config.ppo.advantage} has none"
        )
    if config.model.value != "separate":
        raise ConfigError(
            f"ppo.value_init: reward_model needs model.value: separate: {config.model.value} is "
            "not a transformer of its own"
        )
    if config.lora.rank is not None:
        raise ConfigError(
            "ppo.value_init: reward_model cannot be combined with lora.rank: a value function with "
            "adapters starts from the policy"
        )
    if len(config.reward.models()) != 1:
        raise ConfigError(
            "ppo.value_init: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}"
        )


def _check_linear_value(config: RunConfig) -> None:
    if len(config.reward.models()) != 1:
        raise ConfigError(
            "model.value: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}: set model.value: shared"
        )
    if config.ppo.value_warmup:
        raise ConfigError(
            "ppo.value_warmup has nothing to train with model.value: reward_model, which is fitted "
            "in each step: leave it out"
        )
    if config.rollout.dynamic:
        raise ConfigError(
            "rollout.dynamic cannot be combined with model.value: reward_model: set model.value: "
            "shared"
        )


def _check_controller(config: RunConfig) -> None:
    kl, rollout = config.kl, config.rollout
    if not kl.beta_min < kl.beta_max:
        raise ConfigError(f"kl.beta_min ({kl.beta_min}) must be below kl.beta_max ({kl.beta_max})")
    if kl.controller == "adaptive" and largest_change(kl.horizon, rollout.batch_size) >= 1:
        raise ConfigError(
            f"kl.horizon ({kl.horizon:g}) is too small for rollout.batch_size "
            f"({rollout.batch_size}): it must exceed {horizon_for(1, rollout.batch_size):g}"
        )
