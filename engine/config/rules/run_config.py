"""All rules between the keys of a run. The range of a single key is part of its type."""

from typing import Any

from engine.config.rules.data import check_data
from engine.config.rules.environment import check_environment
from engine.config.rules.evaluation import check_evaluation
from engine.config.rules.launch import check_launch
from engine.config.rules.models import check_models
from engine.config.rules.ppo import check_ppo
from engine.config.rules.reward import check_reward
from engine.config.rules.rollout import check_rollout
from engine.config.rules.supervision import check_guardrails, check_notify
from engine.config.rules.trackers import check_trackers
from engine.config.rules.train import check_train
from engine.config.schema import RunConfig
from engine.config.settings import change_settings
from engine.errors import CommandRejectedError, ConfigError


def check_config(config: RunConfig) -> None:
    """Checks the rules between keys.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    check_reward(config.reward)
    check_ppo(config)
    check_train(config.train)
    check_guardrails(config.guardrails)
    check_data(config.data)
    check_trackers(config.log)
    check_evaluation(config)
    check_launch(config)
    check_notify(config.notify)
    check_rollout(config)
    check_environment(config)
    check_models(config)


def check_change(config: RunConfig, values: dict[str, Any]) -> None:
    """Checks a change of live settings against the rules between keys.

    The rules of the file hold during the run, and a change that breaks one gets the same sentence.
    A configuration that breaks one already, as an earlier version accepted it, can be changed.

    Args:
        config: in force before the change.
        values: setting → new value, of its type and in its range.

    Raises:
        CommandRejectedError: keys would contradict each other.
    """
    try:
        check_config(change_settings(config, values))
    except ConfigError as error:
        try:
            check_config(config)
        except ConfigError:
            return
        raise CommandRejectedError(str(error)) from None
