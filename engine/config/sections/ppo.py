"""The sections `ppo` and `kl`: the objective, its estimators, and the KL coefficient."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config.sections.base import (
    Bounded,
    Coefficient,
    Count,
    Fraction,
    Positive,
    Section,
    Whole,
)


class AdvantageTraits(Struct, frozen=True, kw_only=True):
    """Properties of an advantage estimator that other keys depend on."""

    value_function: bool = False
    """Whether the estimator needs a value function."""
    baseline: bool = False
    """Whether `ppo.baseline` has an effect."""
    scale_rewards: bool = False
    """Whether `ppo.scale_rewards` has an effect."""
    greedy_baseline: bool = False
    """Whether it needs the scores of greedy responses to the step's prompts."""
    squared_probs: bool = False
    """Whether it needs the sum of the squared probabilities at each token."""
    whiten: bool = False
    """Default of `ppo.whiten`."""
    per_prompt: int = 1
    """Default of `rollout.per_prompt`."""
    least_per_prompt: int = 1
    """Lower bound of `rollout.per_prompt`."""


ADVANTAGES = {
    "gae": AdvantageTraits(value_function=True, whiten=True),
    "reward": AdvantageTraits(baseline=True),
    "rloo": AdvantageTraits(per_prompt=4, least_per_prompt=2),
    "grpo": AdvantageTraits(per_prompt=8, least_per_prompt=2, scale_rewards=True),
    "grpo_passk": AdvantageTraits(per_prompt=8, least_per_prompt=2, scale_rewards=True),
    "opo": AdvantageTraits(per_prompt=8, least_per_prompt=2),
    "optimal_token_baseline": AdvantageTraits(per_prompt=8, least_per_prompt=2, squared_probs=True),
    "reinforce_plus_plus": AdvantageTraits(whiten=True),
    "remax": AdvantageTraits(greedy_baseline=True),
}
"""Every estimator, by its name in `ppo.advantage`. :mod:`engine.train.ppo.advantages` has the
functions; the type of the key below lists the same names."""

POLICY_LOSS_RATIOS = {
    "vespo": "sequence",
    "gmpo": "sequence_mean",
    "dppo_tv": "token",
    "dppo_kl": "token",
    "dro": "token",
}
"""`ppo.policy_loss` → the only `ppo.ratio` that it is defined for. The others take any."""

LOSSES_BY_RATIO = ("clipped", "sapo", "gmpo")
"""The values of `ppo.policy_loss` whose gradient passes through the ratio. That of the others
passes through the token's own log π."""

DEFAULT_LAM = 0.95
"""`ppo.lam`, and with a fitted value function `ppo.lam_value`."""
FITTED_VALUE_LAM = 0.9
"""`ppo.lam` with a fitted value function: the better V is, the fewer later rewards are needed."""


class PPOConfig(Section, frozen=True):
    """The PPO objective and its optimisation."""

    # -- advantages and baselines ------------------------------------------------------------------

    advantage: Literal[
        "gae",
        "reward",
        "rloo",
        "grpo",
        "grpo_passk",
        "opo",
        "optimal_token_baseline",
        "reinforce_plus_plus",
        "remax",
    ] = "gae"
    """Advantage estimator: `gae` uses a value function; `reward` uses the response's reward, less a
    baseline; `rloo` subtracts the mean reward of the prompt's other responses; `grpo` subtracts the
    mean reward of the prompt's responses and divides by their standard deviation; `grpo_passk`
    gives the best of them its lead over the second, so divided, and the others nothing; `opo`
    subtracts their mean by length, in which each token counts alike; `optimal_token_baseline`
    subtracts at each token the mean in which a response counts by the estimated variance of its
    gradient up to there, which takes another forward pass; `reinforce_plus_plus` uses the rewards
    from each token on, whitened over the batch; `remax` uses them less the score of a greedy
    response to the prompt, which it generates in addition."""
    gamma: Fraction = 1.0
    """Discount γ (gae, optimal_token_baseline, reinforce_plus_plus and remax)."""
    lam: Fraction | None = None
    """λ of generalised advantage estimation (gae only). Default: 0.95; 0.9 with `model.value:
    reward_model`, which predicts returns better."""
    lam_value: Fraction | None = None
    """λ of the returns that the value function learns (gae only); VC-PPO and VAPO use 1. Default:
    `lam`; 0.95 if that is not set, with `model.value: reward_model`."""
    lam_alpha: Positive | None = None
    """α of the length-adaptive λ, which replaces `lam` by 1 - 1 / (α · length) for each response
    (gae only; 0 at least). VAPO uses 0.05, for responses of thousands of tokens. Default: `lam` for
    all lengths."""
    baseline: Literal["none", "batch", "running"] = "batch"
    """Subtracted from the reward with `advantage: reward`: nothing, the mean of the batch, or the
    running mean over steps."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the difference to the group's mean, or the lead, is divided by (grpo, grpo_passk): the
    standard deviation of the prompt's responses, that of the batch, or nothing (Dr. GRPO)."""
    whiten: bool | None = None
    """Whiten advantages over the global batch. Default: that of `advantage`."""
    whiten_scale: bool = True
    """Whether whitening divides by the deviation; false only subtracts the mean."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation (gae only)."""

    # -- batches, epochs and gradients -------------------------------------------------------------

    epochs: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Passes over the rollout of a step. More epochs learn more from each response and move the
    policy further, until too many tokens are clipped (`policy/clipfrac_avg`)."""
    minibatches: Count = 4
    """Optimiser steps per pass."""
    micro_batch_size: Count = 16
    """Responses per forward and backward pass. Affects memory and speed, not the result."""
    micro_batch_by: Literal["responses", "tokens"] = "responses"
    """`tokens`: a pass computes more than `micro_batch_size` responses where they are short, as
    many as have no more tokens, with padding, than `micro_batch_size` of the greatest length. That
    takes no more memory and fewer passes. Affects speed, not the result."""
    stop_kl: Positive | None = None
    """Ends the updates of a step when the approximate KL to the rollout's policy, in nats per
    token, exceeds this. `policy/approxkl_avg` shows the values of earlier steps. Default: never."""
    max_grad_norm: Positive = 1.0
    """Clips the norm of the gradient to this."""

    # -- policy loss and clipping ------------------------------------------------------------------

    policy_loss: Literal[
        "clipped", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "dro"
    ] = "clipped"
    """Loss of a token: `clipped` is PPO's, in which a token whose ratio is clipped has no gradient;
    `cispo` is -advantage · log π times the clipped ratio as a constant, so that every token has one
    (MiniMax-M1, with `clip_range: 1`; ScaleRL has `clip_range_high: 4`); `sapo` clips nothing: the
    gradient fades smoothly as the ratio leaves 1 (Qwen); `vespo` does the same by the ratio of the
    whole response, with `ratio: sequence`; `gmpo` clips the logarithms of the tokens' ratios (to
    0.4 in its paper) and takes the geometric mean, with `ratio: sequence_mean`; `dppo_tv` and
    `dppo_kl` have no gradient where the probability of a token has moved too far, by its difference
    (`clip_range: 0.15` is verl's) or its KL (0.05); `dro` has a squared penalty instead of a
    ratio."""
    clip_range: Annotated[float, Meta(ge=1e-9, le=1)] = 0.2
    """ε of the clipped objective: the probability ratio to the rollout's policy is clipped to
    1 ± ε. 1: no lower bound. With `policy_loss: gmpo` the bound of the ratio's logarithm, with
    `dppo_tv` and `dppo_kl` that of the divergence."""
    clip_range_high: Annotated[float, Meta(ge=1e-9, le=1e6)] | None = None
    """ε of the upper bound; `clip_range` is then only that of the lower one (DAPO's clip-higher;
    its paper uses 0.28). Default: `clip_range`."""
    dual_clip: Annotated[float, Meta(gt=1, le=1e6)] | None = None
    """Bounds the loss of a token whose advantage is negative to this multiple of -advantage
    (dual-clip PPO; 3 is usual). Default: no bound."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """The probability ratio of a token: its own, that of the whole response, or the geometric mean
    over the response's tokens (GSPO, whose paper clips to 1 - 3e-4 and 1 + 4e-4)."""
    loss_aggregation: Literal["token", "sequence", "sequence_sum", "sequence_sum_constant"] = (
        "token"
    )
    """How a minibatch's token losses are combined: `token` is their mean, `sequence` the mean over
    responses of their means (GRPO), `sequence_sum` the mean over responses of their sums (LUSPO),
    `sequence_sum_constant` the same divided by `rollout.max_new_tokens` (Dr. GRPO). The gradients
    of `sequence_sum` are that many times larger than those of `sequence_sum_constant`, which
    matters for `max_grad_norm`."""

    # -- parameters of single policy losses --------------------------------------------------------

    sapo_temperature: Positive = 1.0
    """How fast the gradient fades with `policy_loss: sapo`, if the advantage is positive."""
    sapo_temperature_negative: Positive = 1.05
    """The same if the advantage is negative; those gradients are less stable."""
    vespo_k: Coefficient = 2.0
    """How fast the gradient fades as the ratio falls below 1, with `policy_loss: vespo`, if the
    advantage is not negative."""
    vespo_lambda: Coefficient = 3.0
    """How fast the gradient fades as the ratio rises above 1, with `policy_loss: vespo`. It is
    largest at a ratio of `vespo_k` / `vespo_lambda`."""
    vespo_k_negative: Coefficient = 3.0
    """`vespo_k` if the advantage is negative."""
    vespo_lambda_negative: Coefficient = 2.0
    """`vespo_lambda` if the advantage is negative."""
    dppo_ratio_cap: Annotated[float, Meta(ge=1, le=1e6)] = 20.0
    """Upper bound of the ratio that weights a token with `policy_loss: dppo_tv` and `dppo_kl`."""
    dro_beta: Positive | None = None
    """Weight of the penalty of `policy_loss: dro`, which needs it: this times half the squared log
    ratio is added to a token's loss."""

    # -- tokens and responses left out or held back ------------------------------------------------

    mask_truncated: bool = False
    """Sets the advantages of responses that were cut off to 0, so that the policy learns nothing
    from their scores (DAPO's overlong filtering). A KL or an entropy in the loss still counts
    them."""
    top_entropy: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of a step's tokens that the policy loss trains on: those at which the policy was least
    certain, by the entropy of the distribution they were sampled from (0.2 in "Beyond the 80/20
    rule"). The other advantages are 0; a KL or an entropy in the loss counts all tokens."""
    off_policy_mask: Positive | None = None
    """Leaves tokens of negative advantage out of the policy loss in a response that the policy
    has moved away from by more than this, in nats per token since it was sampled (DeepSeek-V3.2;
    TRL's documentation starts at 0.5). Default: none."""
    clip_cov: Fraction = 0.0
    """Share of a step's tokens that are left out of the policy loss, against a falling entropy:
    drawn from those whose covariance of advantage and log probability is in `clip_cov_range`
    (Clip-Cov; its paper uses 0.0002). 0: none."""
    clip_cov_range: tuple[Bounded, Bounded] = (1.0, 5.0)
    """Lowest and highest covariance of tokens that `clip_cov` leaves out."""
    kl_cov: Fraction = 0.0
    """Share of a step's tokens, those of the highest covariance, that are held back by a penalty on
    the change of their log probability (KL-Cov; its paper uses 0.0002 to 0.002, and does not clip
    ratios: `clip_range: 1`, `clip_range_high: 1e6`). 0: none."""
    kl_cov_coef: Coefficient = 1.0
    """Weight of that penalty in a token's loss."""

    # -- entropy -----------------------------------------------------------------------------------

    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus: this times the mean entropy is subtracted from the loss. Usual
    values are 0.001 to 0.01."""
    entropy_target: Positive | None = None
    """Adapts the weight to hold the entropy, in nats per token: in each step whose rollout has
    a lower one, the weight rises by `entropy_coef_step`; otherwise it falls by as much, and the
    bonus is left out (Skywork-OR1). It begins at `entropy_coef`. Default: the weight is fixed."""
    entropy_coef_step: Positive = 0.005
    """Change of the adapted weight in a step."""
    entropy_coef_min: Coefficient = 0.0
    """Lower limit of the adapted weight."""
    entropy_coef_max: Positive = 1.0
    """Upper limit of the adapted weight."""

    # -- mixtures of experts -----------------------------------------------------------------------

    router_coef: Coefficient = 0.0
    """Weight of the load-balancing loss of a mixture of experts (Switch Transformer), as
    transformers defines it for the model; usual is 0.001. It is computed for each micro-batch."""

    # -- value function ----------------------------------------------------------------------------

    value_coef: Coefficient = 0.1
    """Weight of the value loss."""
    value_head_rate: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    """Learning rate of the value head, as a multiple of `train.learning_rate`. Default: 10, because
    the head is trained from scratch; 1 with adapters, whose rate is already ten times higher;
    `value_rate` with `value_init: reward_model`."""
    value_rate: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Learning rate of the value function's own transformer (`model.value: separate`), as a
    multiple of `train.learning_rate`. About 10 is usual for policies of a billion parameters."""
    value_init: Literal["zero", "reward_model"] = "zero"
    """Where the value function starts: a head of zeros on the policy's transformer, or transformer
    and head of the reward model (`model.value: separate` only; the reward model must read the
    policy's tokens)."""
    value_clip: Positive | None = None
    """Clips the value to that of the rollout ± this; 0.2 is usual with normalised scores. Default:
    no clipping."""
    value_warmup: Whole = 0
    """Number of first steps that train the value function only (value pretraining, VC-PPO)."""
    value_max_grad_norm: Positive | None = None
    """Clips the norm of the gradient of a separate value function (`model.value: separate`) to
    this, and `max_grad_norm` then is for the policy alone. Default: `max_grad_norm` is for the
    gradient of both together."""

    # -- corrections for another rollout engine ----------------------------------------------------

    rollout_correction: Literal[
        "none", "truncate", "mask", "sequence_truncate", "sequence_mask", "sequence_mean_mask"
    ] = "none"
    """Weights a token's policy loss by its probability under the policy divided by the one that it
    was sampled with, if these differ: with `rollout.engine: vllm`, or in bfloat16. `truncate`
    bounds the weight by `rollout_correction_cap` and `_floor` (truncated importance sampling),
    `mask` makes it 0 beyond them (IcePop with 5 and 0.5). `sequence_truncate` and `sequence_mask`
    give all tokens of a response the weight of the whole response, which for long responses is
    rarely near 1; `sequence_mean_mask` drops the responses whose mean weight, the geometric one, is
    beyond the bounds, and leaves tokens their own (seq-mask-tis in OpenRLHF; with 1.001 and 0.999,
    or 2 and 0.5)."""
    rollout_correction_cap: Annotated[float, Meta(ge=1, le=1e6)] = 2.0
    """Upper bound of the weight of `rollout_correction`."""
    rollout_correction_floor: Fraction = 0.0
    """Lower bound of that weight."""
    rollout_correction_normalise: bool = False
    """Divides those weights by their mean over the step's tokens, or over its responses if they
    have one each, so that they do not shrink or stretch the update as a whole."""
    rollout_rejection: Literal[
        "none",
        "token_k2",
        "token_k3",
        "sequence_mean_k2",
        "sequence_mean_k3",
        "sequence_sum_k2",
        "sequence_sum_k3",
        "sequence_max_k2",
        "sequence_max_k3",
    ] = "none"
    """Leaves out of the policy loss what was sampled with too different probabilities, with or
    without `rollout_correction`: tokens whose estimate of the KL from the sampling distribution
    (`k2` or `k3`, see `kl.estimator`) is above `rollout_rejection_limit`, or responses whose mean,
    sum or maximum over tokens is (`rollout_rs` in verl)."""
    rollout_rejection_limit: Positive | None = None
    """The limit of `rollout_rejection`, in nats; required with it. verl suggests 0.01 for
    `sequence_mean_k3`."""

    @property
    def traits(self) -> AdvantageTraits:
        """The properties of the chosen estimator."""
        return ADVANTAGES[self.advantage]


class ReferenceUpdateConfig(Section, frozen=True):
    """A reference that follows the policy (TRL's `sync_ref_model`)."""

    every: Whole = 0
    """Number of steps between updates of the reference; 0 never updates it."""
    mix: Annotated[float, Meta(gt=0, le=1)] = 0.6
    """Fraction of the policy in an updated reference, the rest being the old reference; 1 copies
    the policy. The KL is then measured against a model that is closer to the policy."""


class KLConfig(Section, frozen=True):
    """The KL coefficient β (beta) and its controller."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` adjusts beta after each step to keep the KL near the target."""
    beta: Coefficient = 0.05
    """Cost of a nat of KL, in units of the score; a higher beta keeps the policy closer to the
    reference. With `controller: adaptive`, the initial value."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """What is penalised at each token, with d = log π - log π_ref: `k1` is d, `k2` is d²/2, `k3` is
    exp(-d) - 1 + d (GRPO), `abs` is |d|. `objective/kl` and the adaptive controller use k1 in every
    case."""
    place: Literal["reward", "loss"] = "reward"
    """Where beta times the estimate goes: it is subtracted from the reward, or added to the loss
    (GRPO)."""
    importance_weighted: bool = False
    """With `place: loss`, multiplies a token's estimate by its probability ratio (`ppo.ratio`), so
    that the gradient of k1 and k3 is that of the KL (DeepSeek-V3.2; the default of TRL's GRPO)."""
    target: Positive = 6.0
    """KL that you accept, in nats per response: the adaptive controller aims for it, and guard
    rails compare the KL with it under either controller."""
    horizon: Positive = 10_000.0
    """Number of responses over which the adaptive controller changes beta by a factor of at most
    about e^0.2: in a step by at most 20 % × `rollout.batch_size` / horizon. Ziegler et al. 2019 use
    512 responses per step, which gives 1 %."""
    beta_min: Positive = 1e-4
    """Lower limit of the adaptive controller, which also starts from here if beta is 0."""
    beta_max: Positive = 10.0
    """Upper limit of the adaptive controller."""
    reference_update: ReferenceUpdateConfig = ReferenceUpdateConfig()
