"""The run's configuration: every key, its type, its range and its default.

A configuration is a YAML file of the sections below. It is decoded strictly: an unknown key, a
wrong type or a value out of range is a :class:`~engine.errors.ConfigError` of one line. What was
left out is filled in, so that the ``config.yaml`` of a session states everything that ran.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

# Every number has two bounds. They leave room for any value that a person could mean, and keep out
# those with which a step overflows or never ends.
Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]
NonNegative = Annotated[float, Meta(ge=0, le=1e12)]
Coefficient = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Seconds = Annotated[float, Meta(ge=1e-9, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=10**12)]
Whole = Annotated[int, Meta(ge=0, le=10**12)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of the file."""


class DataConfig(Section, frozen=True):
    """The prompts."""

    prompts: str
    """A .jsonl, .json, .csv or .parquet file, a hub data set id, or `starter:prompts`."""
    column: str = "prompt"
    """Holds the prompt: text, or a list of chat messages (`role`, `content`)."""
    split: str = "train"
    """Of a hub data set."""
    max_prompt_tokens: Count = 512
    """Longer prompts are left out, and counted in the log."""
    shuffle: bool = True
    """A new order each pass over the data, decided by the seed."""


class ModelConfig(Section, frozen=True):
    """The models that are trained or held against."""

    policy: str
    """A Hugging Face model folder or hub id, or `starter:policy`."""
    reference: str | None = None
    """What the KL is taken to; the policy's own start when left out."""
    value: Literal["shared", "separate"] = "shared"
    """The value head on the policy's trunk, or on a trunk of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the forward and backward passes compute in; trained weights are float32."""


class LoRAConfig(Section, frozen=True):
    """Train small adapters beside frozen weights (LoRA), rather than the weights themselves.

    The reference is then the policy with its adapters off: the weights are held once, and in
    `model.dtype`. Adapters want about ten times the learning rate of full training.
    """

    rank: Count | None = None
    """Of the adapters; all weights are trained when left out."""
    alpha: Count | None = None
    """What an adapter adds is multiplied by alpha / rank; twice the rank when left out."""
    targets: list[str] = []
    """Linear layers by the ends of their names (`q_proj`); all but the output's when left out."""


SOURCE_KEYS = ("model", "function")
"""The keys that each say where a score comes from; a source of rewards has exactly one.
:mod:`engine.train.rewards.mix` has what loads each."""


class RewardSource(Section, frozen=True):
    """One voice in a mix of rewards: exactly one of `model` and `function`."""

    model: str | None = None
    """A sequence classifier: folder, hub id, or `starter:reward`."""
    label: int | str | None = None
    """Which of several labels is the score (its logit), by index or name."""
    function: str | None = None
    """`module:function`, called as TRL calls its reward functions."""
    weight: Annotated[float, Meta(ge=-1e6, le=1e6)] = 1.0
    """What its score is multiplied by in the sum."""
    name: str | None = None
    """What its own score is called in the metrics (`reward/NAME`)."""

    @property
    def keys_given(self) -> list[str]:
        """Which of :data:`SOURCE_KEYS` are given."""
        return [key for key in SOURCE_KEYS if getattr(self, key) is not None]

    @property
    def kind(self) -> str:
        """The one that is given, once the rules hold."""
        return self.keys_given[0]

    @property
    def value(self) -> str:
        """Its value."""
        return str(getattr(self, self.kind))


class RewardConfig(Section, frozen=True):
    """Where the score of an answer comes from: one of `model`, `function` and `mix`."""

    model: str | None = None
    """A sequence classifier: folder, hub id, or `starter:reward`."""
    label: int | str | None = None
    """Which of several labels is the score (its logit), by index or name."""
    function: str | None = None
    """`module:function`, called as TRL calls its reward functions."""
    mix: list[RewardSource] = []
    """Several sources, whose scores are added up by weight."""
    path: str | None = None
    """The folder `function` modules are imported from; the configuration file's when left out."""
    normalise: Literal["none", "reference"] = "none"
    """`reference`: mean 0 and standard deviation 1 over answers of the reference model."""
    normalise_samples: Annotated[int, Meta(ge=2, le=1_000_000)] = 64
    """Answers of the reference that are scored for it, once, before the first step."""
    clip: Positive | None = None
    """Scores are held to ±clip, after normalising."""
    missing_eos_penalty: Coefficient | None = None
    """Subtracted from the score of an answer that was cut off."""
    batch_size: Count = 32
    """Answers that a reward model reads at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What reward models are held and computed in."""
    max_tokens: Count = 1024
    """What a reward model reads of prompt and answer, counted from the end."""

    def sources(self) -> list[RewardSource]:
        """The rewards to be summed, whichever way they were written."""
        if self.mix:
            return self.mix
        given = {key: getattr(self, key) for key in SOURCE_KEYS}
        return [RewardSource(**given, label=self.label)]


class RolloutConfig(Section, frozen=True):
    """Generation."""

    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Responses in a step, over all ranks."""
    per_prompt: Count | None = None
    """Responses to each prompt; 4 for rloo, else 1, when left out."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Longer answers are cut off."""
    temperature: Annotated[float, Meta(ge=1e-6, le=1000)] = 1.0
    """Divides the logits of the policy and of the reference, everywhere."""
    stop: list[str] = []
    """An answer also ends where one of these stands in it."""


class AdvantageTraits(Struct, frozen=True, kw_only=True):
    """What the rest of the configuration needs to know of an advantage estimator."""

    value_function: bool = False
    """Whether a value function is trained beside the policy."""
    baseline: bool = False
    """Whether `ppo.baseline` has an effect."""
    whiten: bool = False
    """`ppo.whiten`, when left out."""
    per_prompt: int = 1
    """`rollout.per_prompt`, when left out."""
    least_per_prompt: int = 1
    """What `rollout.per_prompt` must be at least."""


ADVANTAGES = {
    "gae": AdvantageTraits(value_function=True, whiten=True),
    "reward": AdvantageTraits(baseline=True),
    "rloo": AdvantageTraits(per_prompt=4, least_per_prompt=2),
}
"""Every estimator, by its name in `ppo.advantage`; :mod:`engine.train.ppo.advantages` has the
functions. The key's type below lists the same names."""


class PPOConfig(Section, frozen=True):
    """The objective and its optimisation."""

    advantage: Literal["gae", "reward", "rloo"] = "gae"
    """A value function; the answer's reward as it is; or against the prompt's other answers."""
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Passes over one step's rollout."""
    minibatches: Count = 4
    """Optimiser steps in each pass."""
    micro_batch_size: Count = 16
    """Responses in one forward and backward pass; memory, not mathematics."""
    clip_range: Annotated[float, Meta(ge=1e-9, lt=1)] = 0.2
    """ε: how far the ratio to the rollout's policy counts."""
    ratio: Literal["token", "sequence"] = "token"
    """Each token's own, or the whole answer's."""
    gamma: Fraction = 1.0
    """Discount (gae)."""
    lam: Fraction = 0.95
    """λ (gae)."""
    baseline: Literal["none", "batch", "running"] = "batch"
    """Of `advantage: reward`: what is subtracted from R."""
    whiten: bool | None = None
    """Advantages over the global batch; on for gae, off for the others, when left out."""
    whiten_rewards: bool = False
    """Scale the token rewards by their standard deviation (gae only)."""
    value_coef: Coefficient = 0.1
    """Weight of the value loss."""
    value_head_rate: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    """The value head learns at this many times the learning rate, since it starts from nothing; 10,
    or 1 beside adapters, whose own rate is ten times that of whole weights, when left out."""
    value_clip: Positive | None = None
    """Holds V to the rollout's V ± this; 0.2 is usual with normalised scores."""
    value_warmup: Whole = 0
    """First steps in which the value function alone learns."""
    stop_kl: Positive | None = None
    """Passes end when the approximate KL to the rollout's policy exceeds this."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to it."""

    @property
    def traits(self) -> AdvantageTraits:
        """What the chosen estimator needs."""
        return ADVANTAGES[self.advantage]


class KLConfig(Section, frozen=True):
    """The KL coefficient (beta) and its controller."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves beta so that the KL stays near the target."""
    beta: Coefficient = 0.05
    """The coefficient to begin with."""
    target: Positive = 6.0
    """Nats per response."""
    horizon: Positive = 10_000.0
    """Episodes over which the adaptive controller may change beta by a factor of about e^0.2."""
    beta_min: Positive = 1e-4
    """The adaptive controller goes no lower, and starts again from here when beta is 0."""
    beta_max: Positive = 10.0
    """… and no higher."""


class TrainConfig(Section, frozen=True):
    """Length, optimiser, schedule and checkpoints."""

    steps: Count = 200
    """The run ends after this many."""
    max_hours: Positive | None = None
    """Ends the run after this much training time, with a checkpoint."""
    learning_rate: Annotated[float, Meta(ge=1e-12, le=10)] = 1e-5
    """AdamW's, before the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after its warm-up; the last two end near 0."""
    warmup_steps: Whole = 0
    """The learning rate rises over these."""
    adam_eps: Annotated[float, Meta(ge=1e-20, le=100)] = 1e-5
    """AdamW's ε; 1e-8 gives a much larger early KL."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's β1 and β2."""
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """AdamW's."""
    save_every: Whole = 50
    """Steps between checkpoints; 0: only the last one."""
    keep_last: Count = 3
    """The newest checkpoints that stay."""
    keep_best: Whole = 1
    """Also kept: those with the highest mean score."""


class LaunchConfig(Section, frozen=True):
    """The processes."""

    processes: Annotated[int, Meta(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """Ranks on each machine; `auto`: one for each GPU, one without."""
    nodes: Annotated[int, Meta(ge=1, le=100_000)] = 1
    """Machines; the others come by `rlhf-tui join`."""
    rendezvous: str | None = None
    """`HOST:PORT` by which other machines reach this one; needed for more than one."""
    timeout: Seconds = 1800.0
    """Seconds a rank waits for the others before it takes them for lost: more than the slowest
    reward service, model download or write of the journal takes, for which rank 0 waits."""
    threads: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """CPU threads a rank computes with; all cores shared out when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    gpus: list[Whole] = []
    """Which GPUs the ranks may use, by the driver's numbers; all when left out."""
    max_restarts: Whole = 3
    """Starts again, from the last checkpoint, after ranks that died."""
    silence: Seconds = 1800.0
    """Seconds without a sign of life after which a rank is taken for hung, ended and restarted.
    Counts from a rank's first step on."""
    load_silence: Seconds = 1800.0
    """The same while a rank starts and loads, and downloads and reads of large files are silent."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 5
    """Of ranks on a CPU, so that the machine stays usable; 0: like any process."""


class ParallelConfig(Section, frozen=True):
    """How several ranks share the models, and what saves memory."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """The policy whole on each rank, or sharded over them (FSDP2); `auto`: sharded where it would
    not fit. Without effect for one rank."""
    frozen: Literal["keep", "offload"] = "keep"
    """Reference and reward model: on the device (sharded where the policy is), or on the host and
    on the device only while they are used. On a CPU they always rest in a file, unless sharded."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


class LogConfig(Section, frozen=True):
    """What is kept of each step."""

    samples: Whole = 16
    """Answers a step that are kept whole."""
    arrays: Whole = 4
    """Of these, how many with their per-token arrays."""
    tensorboard: bool = True
    """Write event files for TensorBoard into the session's `tb/`."""


class Rule(Section, frozen=True):
    """One guard rail: when a metric is worth a look, and what is done about it."""

    name: str
    """What the alert is called."""
    metric: str
    """By its name; `*`: any metric that is not finite."""
    above: float | None = None
    """Speaks when the metric is above this …"""
    below: float | None = None
    """… or below this."""
    of: str | None = None
    """`above` and `below` are multiples of this setting (`target`, `max_new_tokens` …)."""
    rises: Positive | None = None
    """By this share, against the mean of the last `window` steps."""
    falls: Positive | None = None
    """By this share, against the mean of the last `window` steps."""
    window: Count = 20
    """Steps that `rises` and `falls` look back over."""
    action: Literal["notify", "checkpoint", "pause", "stop"] = "notify"
    """What is done besides telling."""


RULE_CONDITIONS = ("above", "below", "falls", "rises")
"""Keys of a rule that are conditions; :mod:`engine.monitoring.conditions` evaluates them."""


class GuardrailConfig(Section, frozen=True):
    """Rules over metrics that tell the operator where to look."""

    defaults: bool = True
    """The rules that come with the software; one of the same name replaces its default."""
    rules: list[Rule] = []
    """The user's own."""
    silent_rank: Seconds = 300.0
    """Seconds without a sign of life from a rank that are worth a notice."""
    disk_free_gb: NonNegative = 2.0
    """Less than this is worth a notice."""


class NotifyConfig(Section, frozen=True):
    """Where alerts go besides the terminal."""

    command: str | None = None
    """A shell command, run for each alert with the alert as JSON on its standard input."""


class RunConfig(Section, frozen=True):
    """The whole file."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    seed: Annotated[int, Meta(ge=0)] = 0
    lora: LoRAConfig = LoRAConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    train: TrainConfig = TrainConfig()
    launch: LaunchConfig = LaunchConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    guardrails: GuardrailConfig = GuardrailConfig()
    notify: NotifyConfig = NotifyConfig()

    @property
    def answers_per_prompt(self) -> int:
        """Responses to each prompt of a step."""
        return self.rollout.per_prompt or 1

    @property
    def prompts_per_step(self) -> int:
        """Prompts drawn in a step, over all ranks."""
        return self.rollout.batch_size // self.answers_per_prompt


FIXED_AT_START = (
    "seed",
    "data.",
    "model.",
    "lora.",
    "rollout.batch_size",
    "rollout.per_prompt",
    "ppo.advantage",
)
"""Keys (or sections) that decide the model or the data's order: a resume may not change them."""
