"""The configuration of a run: which keys differ from the defaults."""

from typing import Any

import msgspec
from msgspec import Struct

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.config.sections.model import DataConfig, LoRAConfig, ModelConfig
from engine.config.sections.ppo import PPOConfig
from engine.config.sections.reward import RewardConfig


class Setting(Struct, frozen=True):
    """One key of the configuration."""

    key: str
    value: Any
    default: Any
    """None also for keys without a default."""

    @property
    def differs(self) -> bool:
        """Whether the value is not the default."""
        return bool(self.value != self.default)


def settings_of_run(config: RunConfig) -> list[Setting]:
    """Every key, those that differ from the default first, in the order of the schema.

    A default that depends on other keys, such as `rollout.per_prompt`, is computed from them.
    """
    values, defaults = config_file.to_flat(config), config_file.to_flat(_defaults(config))
    plain = {"ppo.advantage": PPOConfig().advantage, "lora.rank": LoRAConfig().rank}
    defaults |= plain
    found = [Setting(key, value, defaults.get(key)) for key, value in values.items()]
    return sorted(found, key=lambda s: not s.differs)


def _defaults(config: RunConfig) -> RunConfig:
    # The path of reward functions is filled in on loading; it is no choice of the user's.
    reward = RewardConfig(path=config.reward.path)
    defaults = RunConfig(
        model=ModelConfig(policy=""),
        data=DataConfig(prompts="", column=config.data.column),
        reward=reward,
        ppo=PPOConfig(advantage=config.ppo.advantage),
        lora=LoRAConfig(rank=config.lora.rank),
    )
    limit = config.rollout.max_new_tokens
    evaluation = msgspec.structs.replace(defaults.eval, max_new_tokens=limit)
    completed = config_file.complete(msgspec.structs.replace(defaults, eval=evaluation))
    data = msgspec.structs.replace(completed.data, column=DataConfig(prompts="").column)
    return msgspec.structs.replace(completed, data=data)
