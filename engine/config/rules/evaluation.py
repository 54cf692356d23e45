"""Rules between the keys of `eval`, and of `train` where it depends on evaluations."""

from engine.config.rules.reward import check_source
from engine.config.schema import RunConfig
from engine.errors import ConfigError
from engine.metrics import METRICS, declaration, nearest


def check_evaluation(config: RunConfig) -> None:
    """Checks what is evaluated, and the metrics that depend on it.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
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
        check_metric(key, metric)
    every = evaluation.every
    if train.best_metric.startswith("eval/") and train.save_every % every:
        raise ConfigError(
            f"train.best_metric is {train.best_metric}, so train.save_every ({train.save_every}) "
            f"must be a multiple of eval.every ({every}): each checkpoint needs its value"
        )


def check_metric(key: str, name: str) -> None:
    """Checks that there is a metric of this name; `key` names it. Raises ConfigError."""
    if declaration(name) is None:
        near = nearest(name, [metric.name for metric in METRICS])
        hint = f" (did you mean '{near}'?)" if near else ""
        raise ConfigError(
            f"{key}: there is no metric '{name}'{hint}; docs/metrics.md lists all of them"
        )
