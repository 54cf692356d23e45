"""Rules of the section `environment` and of the keys that do not work with one."""

import re
from collections.abc import Iterator

from msgspec.structs import replace

from engine.config.rules.reward import names_a_function
from engine.config.schema import RunConfig
from engine.config.sections.environment import EnvironmentConfig


def environment_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in the environment, and in the rewards that it gives."""
    environment = config.environment
    if environment.factory is None:
        yield from _environment_reward_mistakes(config)
    elif not names_a_function(environment.factory):
        yield (f"environment.factory must be written module:name, not '{environment.factory}'")
    if environment.tools:
        yield from _tool_mistakes(config)
    elif environment.call_pattern is not None:
        yield (
            "environment.call_pattern needs environment.tools: without them, environment.factory "
            "gets every turn, also one with a call"
        )
    if not environment.replies:
        if replace(environment, path=None, call_pattern=None) != EnvironmentConfig():
            yield (
                "the keys of environment need environment.factory or environment.tools: without "
                "them nothing replies to the policy"
            )
        return
    if environment.turns == "independent" and not config.rollout.uses_vllm:
        yield (
            "environment.turns: independent needs rollout.engine: vllm; native rollouts take the "
            "turns of all responses together"
        )
    if config.rollout.ahead:
        yield (
            "environment needs rollout.ahead: 0, because it replies to the policy within the step"
        )
    if config.linear_value:
        yield (
            "environment needs model.value: shared or separate, because reward_model is fitted to "
            "responses of one turn"
        )


def _tool_mistakes(config: RunConfig) -> Iterator[str]:
    environment = config.environment
    for i, tool in enumerate(environment.tools):
        key = f"environment.tools[{i}]"
        if ":" in tool and not names_a_function(tool):
            yield f"{key} must be written module:function, not '{tool}'"
        elif ":" not in tool and not tool.isidentifier():
            yield f"{key} must be module:function or a name, not '{tool}'"
        elif ":" not in tool and environment.factory is None:
            yield (
                f"{key}: '{tool}' needs environment.factory, of which it would be a method; write "
                "module:function for another function"
            )
    if "tools" in (config.data.template_arguments or {}):
        yield "give either environment.tools or tools in data.template_arguments"
    try:
        groups = re.compile(environment.call_pattern or "()").groups
    except re.error as error:
        yield f"environment.call_pattern is not a regular expression: {error}"
    else:
        if groups != 1:
            yield "environment.call_pattern needs one group, which finds the JSON of a call"


def _environment_reward_mistakes(config: RunConfig) -> Iterator[str]:
    sources = {
        "reward.mix[{}]" if config.reward.mix else "reward": config.reward.sources(),
        "eval.rewards[{}]": config.eval.rewards,
    }
    for key, given in sources.items():
        for i, source in enumerate(given):
            if source.environment is not None:
                yield f"{key.format(i)}.environment needs environment.factory"
