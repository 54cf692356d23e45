"""All rules between the keys of a run. The range of a single key is part of its type."""

from collections.abc import Iterator
from typing import Any

from engine.config.mistakes import raise_mistakes
from engine.config.rules.data import data_mistakes
from engine.config.rules.environment import environment_mistakes
from engine.config.rules.evaluation import evaluation_mistakes
from engine.config.rules.launch import launch_mistakes
from engine.config.rules.models import model_mistakes
from engine.config.rules.ppo import ppo_mistakes
from engine.config.rules.reward import reward_mistakes
from engine.config.rules.rollout import rollout_mistakes
from engine.config.rules.supervision import guardrail_mistakes, notify_mistakes
from engine.config.rules.trackers import tracker_mistakes
from engine.config.rules.train import train_mistakes
from engine.config.schema import RunConfig
from engine.config.settings import change_settings
from engine.errors import CommandRejectedError, ConfigError


def check_config(config: RunConfig) -> None:
    """Checks the rules between keys.

    Raises:
        ConfigError: keys contradict each other. For each mistake, the message names them and a
            remedy.
    """
    raise_mistakes(_mistakes(config))


def _mistakes(config: RunConfig) -> Iterator[str]:
    yield from reward_mistakes(config.reward)
    yield from ppo_mistakes(config)
    yield from train_mistakes(config.train)
    yield from guardrail_mistakes(config.guardrails)
    yield from data_mistakes(config.data)
    yield from tracker_mistakes(config.log)
    yield from evaluation_mistakes(config)
    yield from launch_mistakes(config)
    yield from notify_mistakes(config.notify)
    yield from rollout_mistakes(config)
    yield from environment_mistakes(config)
    yield from model_mistakes(config)


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
