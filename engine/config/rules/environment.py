"""Rules of the section `environment` and of the keys that do not work with one."""

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
        _check_without(config)
        return
    if not names_a_function(environment.factory):
        raise ConfigError(
            f"environment.factory must be written module:name, not '{environment.factory}'"
        )
    if config.rollout.ahead:
        raise ConfigError(
            "environment.factory needs rollout.ahead: 0, because the environment replies within "
            "the step"
        )
    if config.linear_value:
        raise ConfigError(
            "environment.factory needs model.value: shared or separate, because reward_model is "
            "fitted to responses of one turn"
        )


def _check_without(config: RunConfig) -> None:
    sources = {
        "reward.mix[{}]" if config.reward.mix else "reward": config.reward.sources(),
        "eval.rewards[{}]": config.eval.rewards,
    }
    for key, given in sources.items():
        for i, source in enumerate(given):
            if source.environment is not None:
                raise ConfigError(f"{key.format(i)}.environment needs environment.factory")
    if replace(config.environment, path=None) != EnvironmentConfig():
        raise ConfigError(
            "the keys of environment need environment.factory: without it nothing replies to the "
            "policy"
        )
