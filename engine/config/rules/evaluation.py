"""Rules between the keys of `eval`, and of `train` where it depends on evaluations."""

from collections.abc import Iterator

from engine.config.rules.reward import source_mistakes
from engine.config.schema import RunConfig
from engine.metrics import METRICS, declaration, nearest


def evaluation_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in what is evaluated, and in the metrics that depend on it."""
    evaluation, train = config.eval, config.train
    if evaluation.prompts is not None and evaluation.holdout:
        yield "give one of eval.prompts and eval.holdout, not both"
    if evaluation.every and evaluation.prompts is None and not evaluation.holdout:
        yield (
            "eval.every needs prompts to evaluate: set eval.prompts, or eval.holdout to hold some "
            "of data.prompts back from training"
        )
    for i, source in enumerate(evaluation.rewards):
        yield from source_mistakes(source, f"eval.rewards[{i}]")
    metrics = {"train.best_metric": train.best_metric}
    if train.stop_at is not None:
        metrics["train.stop_at.metric"] = train.stop_at.metric
        if train.stop_at.above is None and train.stop_at.below is None:
            yield "train.stop_at needs one of above and below"
    for key, metric in metrics.items():
        if metric.startswith("eval/") and not evaluation.every:
            yield f"{key} is {metric}, which needs eval.every: there is no evaluation"
        if metric.startswith("eval/ema_") and train.ema.decay is None:
            yield (f"{key} is {metric}, which needs train.ema.decay: there is no average")
        yield from metric_mistakes(key, metric)
    every = evaluation.every
    if every and train.best_metric.startswith("eval/") and train.save_every % every:
        yield (
            f"train.best_metric is {train.best_metric}, so train.save_every ({train.save_every}) "
            f"must be a multiple of eval.every ({every}): each checkpoint needs its value"
        )


def metric_mistakes(key: str, name: str) -> Iterator[str]:
    """A mistake if there is no metric of this name; `key` names it."""
    if declaration(name) is None:
        near = nearest(name, [metric.name for metric in METRICS])
        hint = f" (did you mean '{near}'?)" if near else ""
        yield (f"{key}: there is no metric '{name}'{hint}; docs/metrics.md lists all of them")
