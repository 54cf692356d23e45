"""The run's configuration: its sections, and which keys are fixed once a run has begun.

A configuration is a YAML file with the sections of :mod:`engine.config.sections`. Decoding is
strict: an unknown key, a wrong type or a value out of range raises a
:class:`~engine.errors.ConfigError` of one line. Omitted keys are filled in, so a session's
``config.yaml`` states every value of the run.
"""

from typing import Annotated

from msgspec import Meta

from engine.config.sections.base import Section
from engine.config.sections.environment import EnvironmentConfig
from engine.config.sections.launch import LaunchConfig, ParallelConfig
from engine.config.sections.model import DataConfig, LoRAConfig, ModelConfig
from engine.config.sections.ppo import KLConfig, PPOConfig
from engine.config.sections.reward import RewardConfig
from engine.config.sections.rollout import EvalConfig, RolloutConfig
from engine.config.sections.supervision import GuardrailConfig, LogConfig, NotifyConfig
from engine.config.sections.train import TrainConfig


class RunConfig(Section, frozen=True):
    """A complete configuration."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    seed: Annotated[int, Meta(ge=0)] = 0
    lora: LoRAConfig = LoRAConfig()
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
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

    @property
    def reply_tokens(self) -> int:
        """Most tokens in a response that an environment wrote; 0 without one."""
        return self.environment.max_tokens if self.environment.replies else 0

    @property
    def linear_value(self) -> bool:
        """Whether the value function is fitted to the reward model's hidden states."""
        return self.model.value == "reward_model" and self.ppo.traits.value_function

    @property
    def trained_value(self) -> str | None:
        """The value function that checkpoints hold, `shared` or `separate`; None without one."""
        trained = self.ppo.traits.value_function and not self.linear_value
        return self.model.value if trained else None


FIXED_AT_START = (
    "seed",
    "data.",
    "model.",
    "lora.",
    "rollout.engine",
    "rollout.batch_size",
    "rollout.per_prompt",
    "ppo.advantage",
    "ppo.value_init",
    "eval.holdout",
    "train.optimiser",
)
"""Keys and sections that determine the model, the order of the data or the optimiser's state in a
checkpoint: fixed on a resume."""
FREE_ON_RESUME = ("data.cache",)
"""Keys of these sections that a resume may change all the same."""


def is_fixed_at_start(key: str) -> bool:
    """Whether a resume must keep the value of a dotted key."""
    sections = tuple(name for name in FIXED_AT_START if name.endswith("."))
    return (key in FIXED_AT_START or key.startswith(sections)) and key not in FREE_ON_RESUME
