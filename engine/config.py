"""The run's configuration: every key, its type, its range and its default.

A configuration is a YAML file of the sections below. It is decoded strictly: an unknown key, a
wrong type or a value out of range is a :class:`~engine.errors.ConfigError` of one line. What was
left out is filled in, so that the ``config.yaml`` of a session states everything that ran.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]


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
    """What the forward and backward passes compute in; master weights are float32."""


class RewardSource(Section, frozen=True):
    """One voice in a mix of rewards: exactly one of `model` and `function`."""

    model: str | None = None
    """A sequence classifier: folder, hub id, or `starter:reward`."""
    label: int | str | None = None
    """Which of several labels is the score (its logit), by index or name."""
    function: str | None = None
    """`module:function`, called as TRL calls its reward functions."""
    weight: float = 1.0
    name: str | None = None
    """What its own score is called in the metrics (`reward/NAME`)."""


class RewardConfig(Section, frozen=True):
    """Where the score of an answer comes from: one of `model`, `function` and `mix`."""

    model: str | None = None
    label: int | str | None = None
    function: str | None = None
    mix: list[RewardSource] = []
    path: str | None = None
    """The folder `function` modules are imported from; the configuration file's when left out."""
    normalise: Literal["none", "reference"] = "none"
    """`reference`: mean 0 and standard deviation 1 over answers of the reference model."""
    normalise_samples: Annotated[int, Meta(ge=2)] = 64
    clip: Positive | None = None
    """Scores are held to ±clip, after normalising."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of an answer that was cut off."""
    batch_size: Count = 32
    max_tokens: Count = 1024
    """What a reward model reads of prompt and answer, counted from the end."""

    def sources(self) -> list[RewardSource]:
        """The rewards to be summed, whichever way they were written."""
        if self.mix:
            return self.mix
        return [RewardSource(model=self.model, label=self.label, function=self.function)]


class RolloutConfig(Section, frozen=True):
    """Generation."""

    batch_size: Count = 64
    """Responses in a step, over all ranks."""
    per_prompt: Count | None = None
    """Responses to each prompt; 4 for rloo, else 1, when left out."""
    max_new_tokens: Count = 64
    temperature: Positive = 1.0
    """Divides the logits of the policy and of the reference, everywhere."""
    stop: list[str] = []
    """An answer also ends where one of these stands in it."""


class PPOConfig(Section, frozen=True):
    """The objective and its optimisation."""

    advantage: Literal["gae", "reward", "rloo"] = "gae"
    epochs: Count = 4
    """Passes over one step's rollout."""
    minibatches: Count = 4
    """Optimiser steps in each pass."""
    micro_batch_size: Count = 16
    """Responses in one forward and backward pass; memory, not mathematics."""
    clip_range: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    ratio: Literal["token", "sequence"] = "token"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    baseline: Literal["none", "batch", "running"] = "batch"
    """Of `advantage: reward`: what is subtracted from R."""
    whiten: bool | None = None
    """Advantages over the global batch; on for gae, off for the others, when left out."""
    whiten_rewards: bool = False
    """Scale the token rewards by their standard deviation (gae only)."""
    value_coef: NonNegative = 0.1
    value_clip: Positive | None = None
    value_warmup: Whole = 0
    """First steps in which the value function alone learns."""
    stop_kl: Positive | None = None
    """Passes end when the approximate KL to the rollout's policy exceeds this."""
    max_grad_norm: Positive = 1.0


class KLConfig(Section, frozen=True):
    """The KL coefficient (beta) and its controller."""

    controller: Literal["fixed", "adaptive"] = "fixed"
    beta: NonNegative = 0.05
    target: Positive = 6.0
    """Nats per response."""
    horizon: Positive = 10_000.0
    """Episodes over which the adaptive controller may change beta by a factor of about e^0.2."""
    beta_min: Positive = 1e-4
    beta_max: Positive = 10.0


class TrainConfig(Section, frozen=True):
    """Length, optimiser, schedule and checkpoints."""

    steps: Count = 200
    max_hours: Positive | None = None
    """Ends the run after this much training time, with a checkpoint."""
    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Whole = 0
    adam_eps: Positive = 1e-5
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    save_every: Whole = 50
    """Steps between checkpoints; 0: only the last one."""
    keep_last: Count = 3
    keep_best: Whole = 1
    """Also kept: those with the highest mean score."""


class LaunchConfig(Section, frozen=True):
    """The processes."""

    processes: Count | Literal["auto"] = 1
    nodes: Count = 1
    threads: Count | None = None
    """CPU threads a rank computes with; all cores shared out when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: list[Whole] = []
    """Which GPUs the ranks may use, by the driver's numbers; all when left out."""
    max_restarts: Whole = 3
    """Starts again, from the last checkpoint, after ranks that died."""
    silence: Positive = 1800.0
    """Seconds without a sign of life after which a rank is taken for hung, ended and restarted."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 5
    """Of ranks on a CPU, so that the machine stays usable; 0: like any process."""


class ParallelConfig(Section, frozen=True):
    """How many ranks share the work."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


class LogConfig(Section, frozen=True):
    """What is kept of each step."""

    samples: Whole = 16
    """Answers a step that are kept whole."""
    arrays: Whole = 4
    """Of these, how many with their per-token arrays."""
    tensorboard: bool = True


class Rule(Section, frozen=True):
    """One guard rail: when a metric is worth a look, and what is done about it."""

    name: str
    metric: str
    """By its name; `*`: any metric that is not finite."""
    above: float | None = None
    below: float | None = None
    of: str | None = None
    """`above` and `below` are multiples of this setting (`target`, `max_new_tokens` …)."""
    rises: Positive | None = None
    falls: Positive | None = None
    """By this share, against the mean of the last `window` steps."""
    window: Count = 20
    action: Literal["notify", "checkpoint", "pause", "stop"] = "notify"


class GuardrailConfig(Section, frozen=True):
    """Rules over metrics that tell the operator where to look."""

    defaults: bool = True
    """The rules that come with the software; one of the same name replaces its default."""
    rules: list[Rule] = []
    silent_rank: Positive = 300.0
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
    seed: Whole = 0
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
    "rollout.batch_size",
    "rollout.per_prompt",
    "ppo.advantage",
)
"""Keys (or sections) that decide the model or the data's order: a resume may not change them."""


RELATIVE_TO = ("target", "max_new_tokens", "beta", "clip_range", "learning_rate", "stop_kl")
"""Settings that a guard rail's bound may be a multiple of."""


def check(config: RunConfig) -> None:
    """Holds the rules between keys; each key's own range is in its type.

    Raises:
        ConfigError: names the keys that do not go together and what would.
    """
    _check_reward(config.reward)
    _check_batches(config)
    kl, rollout = config.kl, config.rollout
    if not kl.beta_min < kl.beta_max:
        raise ConfigError(f"kl.beta_min ({kl.beta_min}) must be below kl.beta_max ({kl.beta_max})")
    if kl.controller == "adaptive" and 0.2 * rollout.batch_size / kl.horizon >= 1:
        raise ConfigError(
            f"kl.horizon ({kl.horizon:g}) is too small for rollout.batch_size "
            f"({rollout.batch_size}): it must exceed {0.2 * rollout.batch_size:g}"
        )
    for rule in config.guardrails.rules:
        _check_rule(rule)
    if config.launch.nodes != 1 or config.launch.processes not in (1, "auto"):
        raise ConfigError("launch.processes and launch.nodes must be 1: one rank is what runs yet")


def _check_rule(rule: Rule) -> None:
    where = f"guardrails.rules '{rule.name}'"
    conditions = (rule.above, rule.below, rule.rises, rule.falls)
    if rule.metric != "*" and all(c is None for c in conditions):
        raise ConfigError(f"{where} needs one of above, below, rises and falls")
    if rule.of is not None and rule.of not in RELATIVE_TO:
        raise ConfigError(f"{where}.of must be one of {', '.join(RELATIVE_TO)} (it is '{rule.of}')")


def _check_reward(reward: RewardConfig) -> None:
    given = [k for k in ("model", "function", "mix") if getattr(reward, k)]
    if len(given) != 1:
        have = " and ".join(f"reward.{k}" for k in given) or "none"
        raise ConfigError(
            f"give exactly one of reward.model, reward.function and reward.mix (given: {have})"
        )
    for i, source in enumerate(reward.sources()):
        where = f"reward.mix[{i}]" if reward.mix else "reward"
        if (source.model is None) == (source.function is None):
            raise ConfigError(f"{where} needs exactly one of model and function")
        if source.function is not None and not _names_a_function(source.function):
            raise ConfigError(
                f"{where}.function must be written module:function, not '{source.function}'"
            )


def _names_a_function(text: str) -> bool:
    module, _, function = text.partition(":")
    return all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def _check_batches(config: RunConfig) -> None:
    batch, per_prompt = config.rollout.batch_size, config.answers_per_prompt
    if config.ppo.advantage == "rloo" and per_prompt < 2:
        raise ConfigError("rollout.per_prompt must be 2 or more for ppo.advantage: rloo")
    if batch % per_prompt:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of rollout.per_prompt ({per_prompt})"
        )
    if batch % config.ppo.minibatches:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of "
            f"ppo.minibatches ({config.ppo.minibatches})"
        )
    if batch < 2 and config.ppo.baseline == "batch" and config.ppo.advantage == "reward":
        raise ConfigError("ppo.baseline: batch needs rollout.batch_size of 2 or more")
