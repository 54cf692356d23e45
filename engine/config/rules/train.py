"""Rules of the section `train`; those that depend on evaluations are with these."""

from engine.config.deadline import deadline
from engine.config.sections.train import TrainConfig
from engine.errors import ConfigError


def check_train(train: TrainConfig) -> None:
    """Checks the schedule, the average and the deadline. Raises ConfigError."""
    if train.ema.offload and train.ema.decay is None:
        raise ConfigError("train.ema.offload needs train.ema.decay: without it there is no average")
    if train.final_rate and train.schedule == "constant":
        raise ConfigError(
            "train.final_rate needs train.schedule: linear or cosine: a constant rate does not "
            "decay"
        )
    deadline(train, {})
