"""The rules between keys. The range of a single key is part of its type."""

from typing import Any

from engine.config.deadline import deadline
from engine.config.rules.data import check_data
from engine.config.rules.models import check_models
from engine.config.rules.reward import check_reward, check_source
from engine.config.rules.rollout import check_rollout
from engine.config.rules.supervision import check_notify, check_rule
from engine.config.rules.trackers import check_trackers
from engine.config.schema import RunConfig
from engine.config.settings import change_settings
from engine.errors import CommandRejectedError, ConfigError
from engine.metrics import declaration


def check_config(config: RunConfig) -> None:
    """Checks the rules between keys.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    check_reward(config.reward)
    _check_batches(config)
    _check_objective(config)
    if config.lora.rank is None and (config.lora.alpha is not None or config.lora.targets):
        raise ConfigError(
            "lora.alpha and lora.targets need lora.rank: without a rank there are no adapters"
        )
    kl, rollout = config.kl, config.rollout
    if not kl.beta_min < kl.beta_max:
        raise ConfigError(f"kl.beta_min ({kl.beta_min}) must be below kl.beta_max ({kl.beta_max})")
    if kl.controller == "adaptive" and 0.2 * rollout.batch_size / kl.horizon >= 1:
        raise ConfigError(
            f"kl.horizon ({kl.horizon:g}) is too small for rollout.batch_size "
            f"({rollout.batch_size}): it must exceed {0.2 * rollout.batch_size:g}"
        )
    if config.train.ema.offload and config.train.ema.decay is None:
        raise ConfigError("train.ema.offload needs train.ema.decay: without it there is no average")
    deadline(config.train, {})
    for rule in config.guardrails.rules:
        check_rule(rule)
    check_data(config.data)
    check_trackers(config.log)
    _check_evaluation(config)
    _check_launch(config)
    check_notify(config.notify)
    check_rollout(config)
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


def _check_objective(config: RunConfig) -> None:
    kl, ppo = config.kl, config.ppo
    if kl.place == "loss" and kl.estimator == "k1":
        raise ConfigError(
            "kl.place: loss needs kl.estimator: k2 or k3, because the gradient of k1 is zero in "
            "expectation and would not hold the policy back"
        )
    if kl.reference_update.every and config.lora.rank is not None:
        raise ConfigError(
            "kl.reference_update cannot be combined with lora.rank: the reference is the policy "
            "without its adapters"
        )
    if ppo.value_init == "reward_model":
        _check_value_init(config)
    if config.linear_value:
        _check_linear_value(config)


def _check_value_init(config: RunConfig) -> None:
    if not config.ppo.traits.value_function:
        raise ConfigError(
            f"ppo.value_init: reward_model needs a value function, and ppo.advantage: "
            f"{config.ppo.advantage} has none"
        )
    if config.model.value != "separate":
        raise ConfigError(
            f"ppo.value_init: reward_model needs model.value: separate: {config.model.value} is "
            "not a transformer of its own"
        )
    if config.lora.rank is not None:
        raise ConfigError(
            "ppo.value_init: reward_model cannot be combined with lora.rank: a value function with "
            "adapters starts from the policy"
        )
    if len(config.reward.models()) != 1:
        raise ConfigError(
            "ppo.value_init: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}"
        )


def _check_linear_value(config: RunConfig) -> None:
    if len(config.reward.models()) != 1:
        raise ConfigError(
            "model.value: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}: set model.value: shared"
        )
    if config.ppo.value_warmup:
        raise ConfigError(
            "ppo.value_warmup has nothing to train with model.value: reward_model, which is fitted "
            "after each step: leave it out"
        )
    if config.rollout.dynamic:
        raise ConfigError(
            "rollout.dynamic cannot be combined with model.value: reward_model: set model.value: "
            "shared"
        )


def _check_evaluation(config: RunConfig) -> None:
    evaluation, train = config.eval, config.train
    if evaluation.prompts is not None and evaluation.holdout:
        raise ConfigError("give one of eval.prompts and eval.holdout, not both")
    if evaluation.every and evaluation.prompts is None and not evaluation.holdout:
        raise ConfigError(
            "eval.every needs prompts to evaluate: set eval.prompts, or eval.holdout to hold some "
            "of data.prompts back from training"
        )
    for i, source in enumerate(evaluation.rewards):
        check_source(source, f"eval.rewards[{i}]")
    metrics = {"train.best_metric": train.best_metric}
    if train.stop_at is not None:
        metrics["train.stop_at.metric"] = train.stop_at.metric
        if train.stop_at.above is None and train.stop_at.below is None:
            raise ConfigError("train.stop_at needs one of above and below")
    for key, metric in metrics.items():
        if metric.startswith("eval/") and not evaluation.every:
            raise ConfigError(f"{key} is {metric}, which needs eval.every: there is no evaluation")
        if metric.startswith("eval/ema_") and train.ema.decay is None:
            raise ConfigError(
                f"{key} is {metric}, which needs train.ema.decay: there is no average"
            )
        if declaration(metric) is None:
            raise ConfigError(
                f"{key}: there is no metric '{metric}'; docs/metrics.md lists all of them"
            )
    every = evaluation.every
    if train.best_metric.startswith("eval/") and train.save_every % every:
        raise ConfigError(
            f"train.best_metric is {train.best_metric}, so train.save_every ({train.save_every}) "
            f"must be a multiple of eval.every ({every}): each checkpoint needs its value"
        )


def _check_launch(config: RunConfig) -> None:
    launch = config.launch
    if launch.nodes > 1 and launch.rendezvous is None:
        raise ConfigError(
            f"launch.nodes: {launch.nodes} needs launch.rendezvous: HOST:PORT, at which the other "
            "machines reach this one"
        )
    if launch.fewest_nodes > launch.nodes:
        raise ConfigError(
            f"launch.min_nodes ({launch.min_nodes}) must be at most launch.nodes ({launch.nodes})"
        )
    if launch.rendezvous is not None:
        check_address(launch.rendezvous)
    if 1 <= launch.preempted_exit <= 4:
        raise ConfigError(
            f"launch.preempted_exit: {launch.preempted_exit} means something else already: give 0, "
            "or 5 to 125; 75 is customary"
        )
    per_node = launch.processes if isinstance(launch.processes, int) else 1
    if config.prompts_per_step < launch.nodes * per_node:
        raise ConfigError(
            f"{launch.nodes * per_node} ranks need at least as many prompts per step, not "
            f"{config.prompts_per_step}: raise rollout.batch_size"
        )


def check_address(text: str) -> tuple[str, int]:
    """Splits `HOST:PORT` into host and port. Raises ConfigError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not an address: write HOST:PORT, such as 10.0.0.1:29400")
    return host, int(port)


def _check_batches(config: RunConfig) -> None:
    batch, per_prompt = config.rollout.batch_size, config.responses_per_prompt
    traits = config.ppo.traits
    if per_prompt < traits.least_per_prompt:
        raise ConfigError(
            f"rollout.per_prompt must be at least {traits.least_per_prompt} for "
            f"ppo.advantage: {config.ppo.advantage}"
        )
    if batch % per_prompt:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of rollout.per_prompt ({per_prompt})"
        )
    if batch % config.ppo.minibatches:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of "
            f"ppo.minibatches ({config.ppo.minibatches})"
        )
    if config.rollout.dynamic and per_prompt < 2:
        raise ConfigError(
            "rollout.dynamic needs a rollout.per_prompt of at least 2: one response has no variance"
        )
    if config.reward.overlong.buffer > config.rollout.max_new_tokens:
        raise ConfigError(
            f"reward.overlong.buffer ({config.reward.overlong.buffer}) may be "
            f"rollout.max_new_tokens ({config.rollout.max_new_tokens}) at most"
        )
    if batch < 2 and traits.baseline and config.ppo.baseline == "batch":
        raise ConfigError("ppo.baseline: batch needs a rollout.batch_size of at least 2")
