"""Rules between the keys of `ppo`, `kl` and the batch."""

from collections.abc import Iterator

from engine.config.schema import RunConfig
from engine.config.sections.ppo import LOSSES_BY_RATIO, POLICY_LOSS_RATIOS, PPOConfig
from engine.kl import horizon_for, largest_change


def ppo_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in batches, the objective and the KL controller."""
    yield from _batch_mistakes(config)
    yield from _objective_mistakes(config)
    yield from _policy_loss_mistakes(config)
    yield from _token_weight_mistakes(config.ppo)
    yield from _token_selection_mistakes(config.ppo)
    yield from _value_mistakes(config)
    if config.reward.in_groups:
        yield from _group_score_mistakes(config)
    yield from _controller_mistakes(config)


def _batch_mistakes(config: RunConfig) -> Iterator[str]:
    batch, per_prompt = config.rollout.batch_size, config.responses_per_prompt
    traits = config.ppo.traits
    if per_prompt < traits.least_per_prompt:
        yield (
            f"rollout.per_prompt must be at least {traits.least_per_prompt} for "
            f"ppo.advantage: {config.ppo.advantage}"
        )
    if batch % per_prompt:
        yield (
            f"rollout.batch_size ({batch}) must be a multiple of rollout.per_prompt ({per_prompt})"
        )
    if batch % config.ppo.minibatches:
        yield (
            f"rollout.batch_size ({batch}) must be a multiple of "
            f"ppo.minibatches ({config.ppo.minibatches})"
        )
    if config.rollout.dynamic and per_prompt < 2:
        yield (
            "rollout.dynamic needs a rollout.per_prompt of at least 2: one response has no variance"
        )
    if config.reward.overlong.buffer > config.rollout.max_new_tokens:
        yield (
            f"reward.overlong.buffer ({config.reward.overlong.buffer}) must be at "
            f"most rollout.max_new_tokens ({config.rollout.max_new_tokens})"
        )
    if batch < 2 and traits.baseline and config.ppo.baseline == "batch":
        yield "ppo.baseline: batch needs a rollout.batch_size of at least 2"


def _objective_mistakes(config: RunConfig) -> Iterator[str]:
    kl, ppo = config.kl, config.ppo
    if kl.place == "loss" and kl.estimator == "k1" and not kl.importance_weighted:
        yield (
            "kl.place: loss needs kl.estimator: k2, k3 or abs (or kl.importance_weighted), because "
            "the gradient of k1 is zero in expectation and would not hold the policy back"
        )
    if kl.importance_weighted and kl.place != "loss":
        yield "kl.importance_weighted has no effect without kl.place: loss"
    if not ppo.entropy_coef_min < ppo.entropy_coef_max:
        yield (
            f"ppo.entropy_coef_min ({ppo.entropy_coef_min:g}) must be below ppo.entropy_coef_max "
            f"({ppo.entropy_coef_max:g})"
        )
    if not ppo.whiten_scale and ppo.whiten is False:
        yield "ppo.whiten_scale: false has no effect without ppo.whiten: leave it out"
    if kl.reference_update.every and config.lora.rank is not None:
        yield (
            "kl.reference_update cannot be combined with lora.rank: the reference is the policy "
            "without its adapters"
        )


def _policy_loss_mistakes(config: RunConfig) -> Iterator[str]:
    ppo = config.ppo
    loss, needed = ppo.policy_loss, POLICY_LOSS_RATIOS.get(ppo.policy_loss, ppo.ratio)
    clips = (ppo.dual_clip, ppo.clip_range_high) != (None, None)
    if loss in ("sapo", "vespo", "dro") and clips:
        yield (
            "ppo.dual_clip and ppo.clip_range_high have no effect with ppo.policy_loss: "
            f"{loss}, which clips nothing: leave them out"
        )
    elif loss != "clipped" and ppo.dual_clip is not None:
        yield (
            f"ppo.dual_clip has no effect with ppo.policy_loss: {loss}, which has other bounds: "
            "leave it out"
        )
    if ppo.ratio != needed:
        yield (
            f"ppo.policy_loss: {loss} is not defined for ppo.ratio: {ppo.ratio}: set ppo.ratio: "
            f"{needed}"
        )
    if (loss == "dro") != (ppo.dro_beta is not None):
        yield ("ppo.policy_loss: dro and ppo.dro_beta, the weight of its penalty, need each other")


def _token_weight_mistakes(ppo: PPOConfig) -> Iterator[str]:
    """The mistakes in the keys that leave tokens out of the policy loss, or weight them."""
    if (ppo.rollout_rejection != "none") != (ppo.rollout_rejection_limit is not None):
        yield "ppo.rollout_rejection and ppo.rollout_rejection_limit need each other"
    if ppo.rollout_correction_normalise and ppo.rollout_correction == "none":
        yield "ppo.rollout_correction_normalise needs ppo.rollout_correction"
    if ppo.clip_cov and ppo.kl_cov:
        yield "ppo.clip_cov and ppo.kl_cov are alternatives: leave one of them out"
    if not ppo.clip_cov_range[0] < ppo.clip_cov_range[1]:
        low, high = ppo.clip_cov_range
        yield f"ppo.clip_cov_range must rise: {low:g} is not below {high:g}"


def _token_selection_mistakes(ppo: PPOConfig) -> Iterator[str]:
    """A mistake for each key that leaves out single tokens without effect.

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
            yield (
                f"{key} cannot leave out single tokens with ppo.ratio: {ppo.ratio}, whose gradient "
                "is that of the whole response: leave one of them out"
            )


def _group_score_mistakes(config: RunConfig) -> Iterator[str]:
    given, traits = "normalise: group of a reward source", config.ppo.traits
    if config.responses_per_prompt < 2:
        yield (f"{given} needs a rollout.per_prompt of at least 2: one response has no deviation")
    if traits.value_function or traits.greedy_baseline:
        what = "value function" if traits.value_function else "greedy baseline"
        yield (
            f"{given} cannot be combined with the {what} of ppo.advantage: {config.ppo.advantage}, "
            "which is of a single response: set grpo, for instance"
        )
    for key, plain in (("normalise", "none"), ("clip", None)):
        if getattr(config.reward, key) != plain:
            yield (
                f"reward.{key} cannot be combined with {given}, which already limits the scores: "
                "leave it out"
            )


def _value_mistakes(config: RunConfig) -> Iterator[str]:
    ppo = config.ppo
    separate = ppo.traits.value_function and config.model.value == "separate"
    if ppo.value_max_grad_norm is not None and not separate:
        yield (
            "ppo.value_max_grad_norm needs model.value: separate: other value functions are "
            "clipped with the policy, or not trained by gradients"
        )
    if ppo.value_rate != 1 and not separate:
        yield (
            "ppo.value_rate needs model.value: separate: other value functions have no transformer "
            "of their own; ppo.value_head_rate is that of the head"
        )
    if ppo.value_init == "reward_model":
        yield from _value_init_mistakes(config)
    if config.linear_value:
        yield from _linear_value_mistakes(config)


def _value_init_mistakes(config: RunConfig) -> Iterator[str]:
    if not config.ppo.traits.value_function:
        yield (
            f"ppo.value_init: reward_model needs a value function, and ppo.advantage: "
            f"{config.ppo.advantage} has none"
        )
        return
    if config.model.value != "separate":
        yield (
            f"ppo.value_init: reward_model needs model.value: separate: {config.model.value} is "
            "not a transformer of its own"
        )
    if config.lora.rank is not None:
        yield (
            "ppo.value_init: reward_model cannot be combined with lora.rank: a value function with "
            "adapters starts from the policy"
        )
    if not _has_one_reward_model(config):
        yield (
            "ppo.value_init: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}"
        )


def _has_one_reward_model(config: RunConfig) -> bool:
    """Whether exactly one source is a reward model; true without sources, an error of its own."""
    sources = config.reward.sources()
    return len(config.reward.models()) == 1 or not any(s.keys_given for s in sources)


def _linear_value_mistakes(config: RunConfig) -> Iterator[str]:
    if not _has_one_reward_model(config):
        yield (
            "model.value: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}: set model.value: shared"
        )
    if config.ppo.value_warmup:
        yield (
            "ppo.value_warmup has nothing to train with model.value: reward_model, which is fitted "
            "in each step: leave it out"
        )
    if config.rollout.dynamic:
        yield (
            "rollout.dynamic cannot be combined with model.value: reward_model: set model.value: "
            "shared"
        )


def _controller_mistakes(config: RunConfig) -> Iterator[str]:
    kl, rollout = config.kl, config.rollout
    if not kl.beta_min < kl.beta_max:
        yield f"kl.beta_min ({kl.beta_min}) must be below kl.beta_max ({kl.beta_max})"
    if kl.controller == "adaptive" and largest_change(kl.horizon, rollout.batch_size) >= 1:
        yield (
            f"kl.horizon ({kl.horizon:g}) is too small for rollout.batch_size "
            f"({rollout.batch_size}): it must exceed {horizon_for(1, rollout.batch_size):g}"
        )
