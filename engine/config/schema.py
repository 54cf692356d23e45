"""The run's configuration: every key, its type, its range and its default.

A configuration is a YAML file with the sections below. Decoding is strict: an unknown key, a wrong
type or a value out of range raises a :class:`~engine.errors.ConfigError` of one line. Omitted keys
are filled in, so a session's ``config.yaml`` states every value of the run.

The docstrings of sections and keys are user documentation: docs/configuration.md is made of them.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from engine.metrics import SCORE

# Every number has two bounds. They admit any value that a person could mean and exclude values that
# overflow or make a step endless.
Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]
NonNegative = Annotated[float, Meta(ge=0, le=1e12)]
Coefficient = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Bounded = Annotated[float, Meta(ge=-1e6, le=1e6)]
Seconds = Annotated[float, Meta(ge=1e-9, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=10**12)]
Whole = Annotated[int, Meta(ge=0, le=10**12)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the sections."""


class DataConfig(Section, frozen=True):
    """The prompts that the policy is trained on."""

    prompts: str
    """A .jsonl, .json, .csv or .parquet file, the id of a data set on the hub, or
    `starter:prompts`."""
    column: str = "prompt"
    """The column that holds the prompt: text, or a list of chat messages (`role`, `content`)."""
    split: str = "train"
    """The split of a data set on the hub."""
    max_prompt_tokens: Count = 512
    """Longer prompts are skipped; the log states how many."""
    shuffle: bool = True
    """Shuffle the prompts for each pass over the data; the seed determines the order."""


class ModelConfig(Section, frozen=True):
    """The policy, the reference and the value function."""

    policy: str
    """The model to train: a Hugging Face model folder, a hub id, or `starter:policy`."""
    reference: str | None = None
    """The model that the KL is measured against. Default: the policy before training."""
    value: Literal["shared", "separate"] = "shared"
    """Whether the value head shares the policy's transformer or has a separate one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward and backward passes. Trained weights are kept in float32."""


class LoRAConfig(Section, frozen=True):
    """Low-rank adapters (LoRA): trains small adapters and freezes the weights of the model.

    The reference is the policy with its adapters disabled, so the weights are held in memory once,
    in `model.dtype`. Adapters need about ten times the learning rate of full training.
    """

    rank: Count | None = None
    """Rank of the adapters. Default: no adapters, all weights are trained."""
    alpha: Count | None = None
    """An adapter's output is scaled by alpha / rank. Default: twice the rank."""
    targets: list[str] = []
    """Linear layers that get adapters, by the end of their names (`q_proj`). Default: all linear
    layers except the output layer."""


SOURCE_KEYS = ("model", "function", "service", "judge")
"""The keys that name the origin of a score; a reward source has exactly one of them.
:mod:`engine.train.rewards.mix` has the loader of each."""
SOURCE_OPTIONS = ("label", "protocol", "judging", "http")
"""Further keys that `reward` and an entry of `reward.mix` have in common."""


class HTTPConfig(Section, frozen=True):
    """The requests to a `service` or a `judge`."""

    token_env: str | None = None
    """Name of an environment variable that holds a bearer token. The token itself is never stored,
    logged or shown."""
    timeout: Annotated[float, Meta(ge=0.01, le=1e6)] = 60.0
    """Seconds within which the whole reply to a request must have arrived."""
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 8
    """Requests at the same time."""
    label_column: str | None = None
    """Column that is sent as `labels` with `protocol: openrlhf`. Default: empty labels."""


class JudgeConfig(Section, frozen=True):
    """What a `judge` is asked, and how its reply is read."""

    model: str | None = None
    """Name of the model, as the endpoint knows it; required for a judge."""
    template: str | None = None
    """The text that the judge reads. `{prompt}`, `{response}` and `{COLUMN}`, for a column of the
    data, are replaced; everything else stays as it is. Default: asks for a number from 1 to 10."""
    parse: str | None = None
    """A regular expression that is searched for in the reply; its first group is the number.
    Default: the last number in the reply, which is 8 in `8/10`."""
    scale: tuple[Bounded, Bounded] | None = None
    """Lowest and highest number of the judge, such as `[1, 10]`, which become the scores 0 and 1. A
    number outside counts as none. Default: the number is the score."""
    unparsed: Bounded | None = None
    """Score of a response whose reply has no number. Default: the judge is asked again, then the
    run pauses."""
    options: dict[str, Any] | None = None
    """Further fields of the request, such as `{max_tokens: 512, seed: 1}`. `temperature` is 0
    unless it is given; `{temperature: null}` leaves it out."""


class RewardSource(Section, frozen=True):
    """A term of the weighted sum of scores: one of `model`, `function`, `service` and `judge`."""

    model: str | None = None
    """A sequence classifier: a model folder, a hub id, or `starter:reward`."""
    label: int | str | None = None
    """Index or name of the label whose logit is the score, if the classifier has several."""
    function: str | None = None
    """`module:function`, called with the arguments that TRL passes to reward functions."""
    service: str | None = None
    """URL of a service that scores responses."""
    protocol: Literal["json", "openrlhf"] = "json"
    """What a service is sent and returns: `json` as described in docs/rewards.md, `openrlhf` as a
    remote reward model of OpenRLHF."""
    judge: str | None = None
    """URL of an OpenAI-compatible chat endpoint, such as `http://localhost:8000/v1`, whose model
    rates each response."""
    judging: JudgeConfig = JudgeConfig()
    http: HTTPConfig = HTTPConfig()
    weight: Annotated[float, Meta(ge=-1e6, le=1e6)] = 1.0
    """Weight of the score in the sum. A source of weight 0 is watched and not obeyed: its score is
    recorded, with the samples and as a metric, and has no effect on training."""
    normalise: Literal["none", "reference"] = "none"
    """`reference`: scale this source's scores to mean 0 and standard deviation 1 over responses of
    the reference model, before they are weighted."""
    name: str | None = None
    """Name of the source in the metrics (`reward/NAME`)."""

    @property
    def keys_given(self) -> list[str]:
        """Those of :data:`SOURCE_KEYS` that have a value."""
        return [key for key in SOURCE_KEYS if getattr(self, key) is not None]

    @property
    def kind(self) -> str:
        """The given key; call it only after the rules were checked."""
        return self.keys_given[0]

    @property
    def value(self) -> str:
        """The value of the given key."""
        return str(getattr(self, self.kind))


class OverlongConfig(Section, frozen=True):
    """A penalty that grows with the length of a response near the limit (DAPO)."""

    buffer: Whole = 0
    """Tokens before `rollout.max_new_tokens` over which the penalty rises linearly from 0; 0 turns
    it off."""
    penalty: Coefficient = 1.0
    """Subtracted from the score of a response of `rollout.max_new_tokens` tokens."""


class RewardConfig(Section, frozen=True):
    """The origin of a score: one of `model`, `function`, `service`, `judge` and `mix`."""

    model: str | None = None
    """A sequence classifier: a model folder, a hub id, or `starter:reward`."""
    label: int | str | None = None
    """Index or name of the label whose logit is the score, if the classifier has several."""
    function: str | None = None
    """`module:function`, called with the arguments that TRL passes to reward functions."""
    service: str | None = None
    """URL of a service that scores responses."""
    protocol: Literal["json", "openrlhf"] = "json"
    """What a service is sent and returns: `json` as described in docs/rewards.md, `openrlhf` as a
    remote reward model of OpenRLHF."""
    judge: str | None = None
    """URL of an OpenAI-compatible chat endpoint, such as `http://localhost:8000/v1`, whose model
    rates each response."""
    judging: JudgeConfig = JudgeConfig()
    http: HTTPConfig = HTTPConfig()
    mix: list[RewardSource] = []
    """Several sources; the score is the weighted sum of theirs."""
    path: str | None = None
    """Folder from which modules of `function` are imported. Default: the folder of the
    configuration file."""
    normalise: Literal["none", "reference"] = "none"
    """`reference`: scale scores to mean 0 and standard deviation 1 over responses of the reference
    model."""
    normalise_samples: Annotated[int, Meta(ge=2, le=1_000_000)] = 64
    """Responses of the reference that are scored once, before the first step, to normalise."""
    clip: Positive | None = None
    """Clips scores to ±clip, after normalising."""
    missing_eos_penalty: Coefficient | None = None
    """Subtracted from the score of a truncated response."""
    overlong: OverlongConfig = OverlongConfig()
    batch_size: Count = 32
    """Responses per forward pass of a reward model, or per request to a service."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and of the computation of reward models."""
    max_tokens: Count = 1024
    """Tokens of prompt and response that a reward model reads; earlier tokens are cut off."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 3
    """Further calls of a function that raises, or further attempts of requests that fail, after 1,
    2, 4 … seconds; then the run pauses with the error as its reason. It calls a function again when
    it is resumed; it resumes by itself when a service or a judge works again."""

    def sources(self) -> list[RewardSource]:
        """The sources to be summed; a single source is a list of one."""
        if self.mix:
            return self.mix
        given = {key: getattr(self, key) for key in (*SOURCE_KEYS, *SOURCE_OPTIONS)}
        return [RewardSource(**given)]

    def models(self) -> list[RewardSource]:
        """The sources that are reward models."""
        return [source for source in self.sources() if source.model is not None]


class EvalConfig(Section, frozen=True):
    """Held-out evaluation: the policy's responses to prompts that are never trained on.

    It is repeated with the same prompts and random numbers, before the first step and every `every`
    steps, so its curves compare steps with each other.
    """

    every: Whole = 0
    """Number of steps between evaluations; 0 for none."""
    prompts: str | None = None
    """A file or data set like `data.prompts`; prompts that are also trained on are left out.
    Default: the prompts of `holdout`."""
    column: str | None = None
    """The column that holds the prompt. Default: `data.column`."""
    split: str = "test"
    """The split of a data set on the hub."""
    holdout: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Number of prompts of `data.prompts` that are never trained on but evaluated; the seed
    determines which."""
    max_prompts: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Maximum number of prompts that are evaluated, the first ones."""
    per_prompt: Annotated[int, Meta(ge=1, le=10_000)] = 1
    """Responses to each prompt."""
    temperature: Annotated[float, Meta(ge=0, le=1000)] | None = None
    """Temperature of the responses; 0 takes the most likely token. Default: 1."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Maximum length of a response. Default: `rollout.max_new_tokens` at the start of the run."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Determines the random numbers of the responses, which are the same at every evaluation."""
    rewards: list[RewardSource] = []
    """Reward sources besides those of `reward`. They are reported as `eval/reward/NAME` and have no
    influence on training; `weight` and `normalise` have no effect."""


class RolloutConfig(Section, frozen=True):
    """Generation of responses."""

    engine: Literal["native"] = "native"
    """What generates: `native` is the trained model itself, in the rank that trains it."""
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Responses per step, over all ranks."""
    at_once: Count | None = None
    """The most responses that a rank generates at once; the others wait until one has ended. Limits
    the memory of the key-value cache; responses change by rounding only. Default: all of them."""
    per_prompt: Count | None = None
    """Responses to each prompt. Default: 4 for rloo, 8 for grpo, 1 otherwise."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Maximum length of a response, in tokens; longer responses are truncated."""
    temperature: Annotated[float, Meta(ge=1e-6, le=1000)] = 1.0
    """Divides the logits of the policy and of the reference, in generation and in training."""
    stop: list[str] = []
    """Texts that end a response, in addition to the end-of-sequence token."""
    dynamic: bool = False
    """Draw prompts again whose responses all have the same raw score: other prompts take their
    place (DAPO's dynamic sampling). Needs `per_prompt` of at least 2."""
    dynamic_limit: Annotated[int, Meta(ge=1, le=1000)] = 10
    """How many times a step draws again with `dynamic`; prompts that are left then stay as they
    are."""


class AdvantageTraits(Struct, frozen=True, kw_only=True):
    """Properties of an advantage estimator that other keys depend on."""

    value_function: bool = False
    """Whether the estimator needs a value function."""
    baseline: bool = False
    """Whether `ppo.baseline` has an effect."""
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
    "grpo": AdvantageTraits(per_prompt=8, least_per_prompt=2),
    "reinforce_plus_plus": AdvantageTraits(whiten=True),
}
"""Every estimator, by its name in `ppo.advantage`. :mod:`engine.train.ppo.advantages` has the
functions; the type of the key below lists the same names."""


class PPOConfig(Section, frozen=True):
    """The PPO objective and its optimisation."""

    advantage: Literal["gae", "reward", "rloo", "grpo", "reinforce_plus_plus"] = "gae"
    """Advantage estimator: `gae` uses a value function; `reward` uses the response's reward, less a
    baseline; `rloo` subtracts the mean reward of the prompt's other responses; `grpo` subtracts the
    mean reward of the prompt's responses and divides by their standard deviation;
    `reinforce_plus_plus` uses the rewards from each token on, whitened over the batch."""
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Passes over the rollout of a step."""
    minibatches: Count = 4
    """Optimiser steps per pass."""
    micro_batch_size: Count = 16
    """Responses per forward and backward pass. Affects memory and speed, not the result."""
    clip_range: Annotated[float, Meta(ge=1e-9, lt=1)] = 0.2
    """ε of the clipped objective: the probability ratio to the rollout's policy is clipped to
    1 ± ε."""
    clip_range_high: Annotated[float, Meta(ge=1e-9, le=1e6)] | None = None
    """ε of the upper bound alone, `clip_range` being that of the lower (DAPO's clip-higher; its
    paper uses 0.28). Default: `clip_range`."""
    dual_clip: Annotated[float, Meta(gt=1, le=1e6)] | None = None
    """Bounds the loss of a token whose advantage is negative to this multiple of -advantage
    (dual-clip PPO; 3 is usual). Default: no bound."""
    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus: this times the mean entropy is subtracted from the loss."""
    loss_aggregation: Literal["token", "sequence", "sequence_sum_constant"] = "token"
    """How the policy loss of a minibatch is made of its tokens' losses: `token` is their mean,
    `sequence` the mean over responses of their means (GRPO), `sequence_sum_constant` the mean over
    responses of their sums divided by `rollout.max_new_tokens` (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether the probability ratio is that of each token or that of the whole response."""
    gamma: Fraction = 1.0
    """Discount γ (gae and reinforce_plus_plus)."""
    lam: Fraction = 0.95
    """λ of generalised advantage estimation (gae only)."""
    lam_value: Fraction | None = None
    """λ of the returns that the value function learns (gae only); VC-PPO and VAPO use 1. Default:
    `lam`."""
    lam_alpha: Positive | None = None
    """α of the length-adaptive λ, which replaces `lam` by 1 - 1 / (α · length) for each response
    (gae only; 0 at least). VAPO uses 0.05, for responses of thousands of tokens. Default: `lam` for
    all lengths."""
    baseline: Literal["none", "batch", "running"] = "batch"
    """Subtracted from the reward with `advantage: reward`: nothing, the mean of the batch, or the
    running mean over steps."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the difference to the group's mean is divided by (grpo only): the standard deviation of
    the prompt's responses, that of the batch, or nothing (Dr. GRPO)."""
    whiten: bool | None = None
    """Whiten advantages over the global batch. Default: on for gae and reinforce_plus_plus, off
    otherwise."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation (gae only)."""
    value_coef: Coefficient = 0.1
    """Weight of the value loss."""
    value_head_rate: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    """Learning rate of the value head, as a multiple of `train.learning_rate`. Default: 10, because
    the head is trained from scratch; 1 with adapters, whose rate is already ten times higher, and
    with `value_init: reward_model`."""
    value_init: Literal["zero", "reward_model"] = "zero"
    """Where the value function starts: a head of zeros on the policy's transformer, or transformer
    and head of the reward model (`model.value: separate` only; the reward model must read the
    policy's tokens)."""
    value_clip: Positive | None = None
    """Clips the value to that of the rollout ± this; 0.2 is usual with normalised scores. Default:
    no clipping."""
    value_warmup: Whole = 0
    """Number of first steps that train the value function only (value pretraining, VC-PPO)."""
    stop_kl: Positive | None = None
    """Ends the updates of a step when the approximate KL to the rollout's policy exceeds this.
    Default: never."""
    max_grad_norm: Positive = 1.0
    """Clips the norm of the gradient to this."""

    @property
    def traits(self) -> AdvantageTraits:
        """The properties of the chosen estimator."""
        return ADVANTAGES[self.advantage]


class ReferenceUpdateConfig(Section, frozen=True):
    """A reference that follows the policy (TRL's `sync_ref_model`)."""

    every: Whole = 0
    """Number of steps between updates of the reference; 0 never updates it."""
    mix: Annotated[float, Meta(gt=0, le=1)] = 0.6
    """An update makes the reference this much of the policy and the rest of the reference; 1 copies
    the policy. The KL is then measured against a model nearer to the policy."""


class KLConfig(Section, frozen=True):
    """The KL coefficient β (beta) and its controller."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` adjusts beta after each step to keep the KL near the target."""
    beta: Coefficient = 0.05
    """Initial coefficient."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """What is penalised at each token, with d = log π - log π_ref: `k1` is d, `k2` is d²/2, `k3` is
    exp(-d) - 1 + d (GRPO). `objective/kl` and the adaptive controller use k1 in every case."""
    place: Literal["reward", "loss"] = "reward"
    """Where beta times the estimate goes: it is subtracted from the reward, or added to the loss
    (GRPO)."""
    target: Positive = 6.0
    """KL that the adaptive controller aims for, in nats per response."""
    horizon: Positive = 10_000.0
    """Number of responses over which the adaptive controller changes beta by a factor of at most
    about e^0.2."""
    beta_min: Positive = 1e-4
    """Lower limit of the adaptive controller, which also starts from here if beta is 0."""
    beta_max: Positive = 10.0
    """Upper limit of the adaptive controller."""
    reference_update: ReferenceUpdateConfig = ReferenceUpdateConfig()


class StopAt(Section, frozen=True):
    """A value of a metric at which the run has reached its aim; give `above` or `below`."""

    metric: str
    """Name of the metric."""
    above: float | None = None
    """The run ends when the metric is above this."""
    below: float | None = None
    """The run ends when the metric is below this."""

    def reached(self, value: float) -> bool:
        """Whether a value of the metric ends the run."""
        return (self.above is not None and value > self.above) or (
            self.below is not None and value < self.below
        )


class TrainConfig(Section, frozen=True):
    """Length of the run, optimiser, schedule and checkpoints."""

    steps: Count = 200
    """Number of PPO steps."""
    max_hours: Positive | None = None
    """Saves a checkpoint and ends the run after this many hours of training. Default: no limit."""
    learning_rate: Annotated[float, Meta(ge=1e-12, le=10)] = 1e-5
    """Learning rate of AdamW, before the schedule is applied."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; `linear` and `cosine` decay to nearly 0 at the last step."""
    warmup_steps: Whole = 0
    """Number of first steps over which the learning rate rises linearly."""
    adam_eps: Annotated[float, Meta(ge=1e-20, le=100)] = 1e-5
    """ε of AdamW; 1e-8 leads to a much larger KL in the first steps."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """β1 and β2 of AdamW."""
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Weight decay of AdamW."""
    save_every: Whole = 50
    """Number of steps between checkpoints; 0 saves at the end only."""
    keep_last: Count = 3
    """Number of newest checkpoints to keep."""
    keep_best: Whole = 1
    """Number of further checkpoints to keep, those with the highest `best_metric`."""
    best_metric: str = SCORE
    """The metric that `keep_best` compares: the mean score, or one of `eval/...`."""
    stop_at: StopAt | None = None
    """Saves a checkpoint and ends the run as finished once a metric has reached a value, such as
    `{metric: eval/score, above: 2}`. Default: never."""


class LaunchConfig(Section, frozen=True):
    """The processes of a run and their supervision."""

    processes: Annotated[int, Meta(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """Ranks on each machine. `auto`: one for each GPU, or one on a machine without GPUs."""
    nodes: Annotated[int, Meta(ge=1, le=100_000)] = 1
    """Number of machines; the others join with `rlhf-tui join`."""
    rendezvous: str | None = None
    """`HOST:PORT` at which other machines reach this one; required if `nodes` is above 1."""
    timeout: Seconds = 1800.0
    """Seconds that a rank waits for the others before it fails. Choose more than the slowest reward
    service, model download or journal write takes, because the other ranks wait for rank 0."""
    threads: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """CPU threads of a rank. Default: the cores divided among the ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks. `auto`: GPUs if there are any."""
    gpus: list[Whole] = []
    """Indices of the GPUs that the ranks may use, as numbered by the driver. Default: all, or
    those that a scheduler has assigned by CUDA_VISIBLE_DEVICES."""
    max_restarts: Whole = 3
    """How many times the ranks are restarted from the last checkpoint after one of them died."""
    silence: Seconds = 1800.0
    """Seconds without a message after which a rank counts as hung and is killed and restarted.
    Applies from the first step of a rank."""
    load_silence: Seconds = 1800.0
    """The same before the first step; downloading or reading large files sends no messages."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 5
    """Niceness of ranks on a CPU, which keeps the machine responsive; 0 is normal priority."""


class ParallelConfig(Section, frozen=True):
    """Distribution of the models over ranks, and options that save memory."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp` replicates the policy on each rank, `fsdp` shards it (FSDP2); `auto` shards it if it
    would not fit otherwise. No effect with one rank."""
    frozen: Literal["keep", "offload"] = "keep"
    """Reference and reward models: `keep` holds them on the device, sharded if the policy is;
    `offload` holds them in host memory and moves them to the device while they are used. On a CPU,
    unsharded ones are always memory-mapped from a file."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""


class LogConfig(Section, frozen=True):
    """What is recorded of each step."""

    samples: Whole = 16
    """Responses recorded per step."""
    arrays: Whole = 4
    """How many of these are recorded with per-token arrays."""
    tensorboard: bool = True
    """Write TensorBoard event files to the session's `tb/`."""


class Rule(Section, frozen=True):
    """One guard rail: a condition on a metric, and the action when it is met.

    It fires when the condition begins to hold, and again each time the metric is twice as far
    beyond its limit as at the last alert.
    """

    name: str
    """Name of the alert."""
    metric: str
    """Name of the metric; `*` matches every metric that is not finite."""
    above: float | None = None
    """Fires when the metric is above this."""
    below: float | None = None
    """Fires when the metric is below this."""
    of: str | None = None
    """A setting such as `target` or `max_new_tokens`; `above` and `below` are multiples of it."""
    rises: Positive | None = None
    """Fires when the metric exceeds the mean of the last `window` steps by this fraction of it."""
    falls: Positive | None = None
    """Fires when the metric is below the mean of the last `window` steps by this fraction of it."""
    window: Count = 20
    """Number of steps in the mean that `rises` and `falls` compare with."""
    action: Literal["notify", "checkpoint", "pause", "stop"] = "notify"
    """Action in addition to the alert; `notify` is the alert alone."""


RULE_CONDITIONS = ("above", "below", "falls", "rises")
"""The keys of a rule that are conditions; :mod:`engine.monitoring.conditions` evaluates them."""


class GuardrailConfig(Section, frozen=True):
    """Guard rails: rules over metrics and over the machine that alert the operator."""

    defaults: bool = True
    """Use the built-in rules; a rule of the same name in `rules` replaces a built-in one."""
    rules: list[Rule] = []
    """Additional rules."""
    silent_rank: Seconds = 300.0
    """Seconds without a message from a rank before an alert."""
    disk_free_gb: NonNegative = 2.0
    """Free disk space, in gigabytes, below which there is an alert."""


class Webhook(Section, frozen=True):
    """A service that is sent each message over HTTP.

    Its URL and its token are secrets: they are read from environment variables of the engine, and
    stand in no file.
    """

    format: Literal["json", "slack", "discord", "ntfy", "telegram"] = "json"
    """What the service understands. `json` is what `notify.command` gets, with the responses that
    are an alert's evidence; the others get one line of text. `slack` is also that of Mattermost."""
    url_variable: str | None = None
    """Name of the environment variable with the URL; for `telegram` only for a server of your
    own."""
    token_variable: str | None = None
    """Name of the environment variable with a token: of the bot for `telegram`, otherwise one that
    is sent as `Authorization: Bearer`."""
    chat: str | Annotated[int, Meta(ge=-1_000_000_000_000_000, le=1_000_000_000_000_000)] | None = (
        None
    )
    """`telegram`: id of the chat, or `@` and the name of the channel."""


class NotifyConfig(Section, frozen=True):
    """Where alerts, restarts, pauses, failures and the end of the run are sent.

    `rlhf-tui notify test NAME` sends a test message. The log says what became of each message.
    """

    command: str | None = None
    """A shell command that is run for each message and gets it as JSON on standard input."""
    webhooks: list[Webhook] = []
    """Services that are sent each message over HTTP."""
    email: list[str] = []
    """Addresses that get each message by the machine's sendmail."""
    sendmail: str | None = None
    """The program that takes the e-mail. Default: `sendmail`."""
    level: Literal["info", "warning", "error"] = "info"
    """The least level that is sent. `error`: failures, and guard rails that pause or stop;
    `warning`: also other alerts and restarts; `info`: also the end of the run, and pauses that a
    person asked for."""
    quiet_hours: str | None = None
    """`HH:MM-HH:MM`, local time: then only the level `error` is sent."""
    max_per_hour: Annotated[int, Meta(ge=1, le=3600)] = 30
    """Alerts within an hour; the next message tells how many further ones were not sent."""


class RunConfig(Section, frozen=True):
    """A complete configuration."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    seed: Annotated[int, Meta(ge=0)] = 0
    lora: LoRAConfig = LoRAConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    train: TrainConfig = TrainConfig()
    launch: LaunchConfig = LaunchConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    guardrails: GuardrailConfig = GuardrailConfig()
    notify: NotifyConfig = NotifyConfig()

    @property
    def responses_per_prompt(self) -> int:
        """Responses to each prompt of a step."""
        return self.rollout.per_prompt or 1

    @property
    def prompts_per_step(self) -> int:
        """Prompts per step, over all ranks."""
        return self.rollout.batch_size // self.responses_per_prompt


FIXED_AT_START = (
    "seed",
    "data.",
    "model.",
    "lora.",
    "rollout.batch_size",
    "rollout.per_prompt",
    "ppo.advantage",
    "ppo.value_init",
    "eval.holdout",
)
"""Keys and sections that determine the model or the order of the data: fixed on a resume."""
