"""Rules of the section `train`; those that depend on evaluations are with these."""

from collections.abc import Iterator

from engine.config.deadline import deadline
from engine.config.mistakes import mistakes_of
from engine.config.sections.train import TrainConfig


def train_mistakes(train: TrainConfig) -> Iterator[str]:
    """The mistakes in the schedule, the average and the deadline."""
    if train.ema.offload and train.ema.decay is None:
        yield "train.ema.offload needs train.ema.decay: without it there is no average"
    if train.final_rate and train.schedule == "constant":
        yield (
            "train.final_rate needs train.schedule: linear or cosine: a constant rate does not "
            "decay"
        )
    yield from mistakes_of(deadline, train, {})
