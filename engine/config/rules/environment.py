"""Rules of the section `environment` and of the keys that do not work with one."""

import re

from msgspec.structs import replace

from engine.config.rules.reward import names_a_function
from engine.config.schema import RunConfig
from engine.config.sections.environment import EnvironmentConfig
from engine.errors import ConfigError


def check_environment(config: RunConfig) -> None:
    """Checks the environment, and the rewards that it gives.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    environment = config.environment
    if environment.factory is None:
        _check_rewards(config)
    elif not names_a_function(environment.factory):
        raise ConfigError(
            f"environment.factory must be written module:name, not '{environment.factory}'"
        )
    if environment.tools:
        _check_tools(config)
    elif environment.call_pattern is not None:
        raise ConfigError(
            "environment.call_pattern needs environment.tools: without them, environment.factory "
            "gets every turn, also one with a call"
        )
    if not environment.replies:
        if replace(environment, path=None) != EnvironmentConfig():
            raise ConfigError(
                "the keys of environment need environment.factory or environment.tools: without "
                "them nothing replies to the policy"
            )
        return
    if environment.turns == "independent" and not config.rollout.uses_vllm:
        raise ConfigError(
            "environment.turns: independent needs rollout.engine: vllm; native rollouts take the "
            "turns of all responses together"
        )
    if config.rollout.ahead:
        raise ConfigError(
            "environment needs rollout.ahead: 0, because it replies to the policy within the step"
        )
    if config.linear_value:
        raise ConfigError(
            "environment needs model.value: shared or separate, because reward_model is fitted to "
            "responses of one turn"
        )


def _check_tools(config: RunConfig) -> None:
    environment = config.environment
    for i, tool in enumerate(environment.tools):
        key = f"environment.tools[{i}]"
        if ":" in tool and not names_a_function(tool):
            raise ConfigError(f"{key} must be written module:function, not '{tool}'")
        if ":" not in tool and not tool.isidentifier():
            raise ConfigError(f"{key} must be module:function or a name, not '{tool}'")
        if ":" not in tool and environment.factory is None:
            raise ConfigError(
                f"{key}: '{tool}' needs environment.factory, of which it would be a method; write "
                "module:function for another function"
            )
    if "tools" in (config.data.template_arguments or {}):
        raise ConfigError("give either environment.tools or tools in data.template_arguments")
    try:
        groups = re.compile(environment.call_pattern or "()").groups
    except re.error as error:
        raise ConfigError(
            f"environment.call_pattern is not a regular expression: {error}"
        ) from None
    if groups != 1:
        raise ConfigError(
            "environment.call_pattern needs one group, which finds the JSON of a call"
        )


def _check_rewards(config: RunConfig) -> None:
    sources = {
        "reward.mix[{}]" if config.reward.mix else "reward": config.reward.sources(),
        "eval.rewards[{}]": config.eval.rewards,
    }
    for key, given in sources.items():
        for i, source in enumerate(given):
            if source.environment is not None:
                raise ConfigError(f"{key.format(i)}.environment needs environment.factory")
