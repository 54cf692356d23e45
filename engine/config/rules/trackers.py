"""Rules of `log.trackers`: the names."""

from collections.abc import Iterator

from engine.config.rules.reward import names_a_function
from engine.config.sections.supervision import LogConfig

TRACKER_PACKAGES = {
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
}
"""Tracker, by accelerate's name → the package that it needs."""


def tracker_mistakes(log: LogConfig) -> Iterator[str]:
    """The mistakes in the names of the trackers."""
    for i, name in enumerate(log.trackers):
        if name not in TRACKER_PACKAGES and not names_a_function(name):
            known = ", ".join(TRACKER_PACKAGES)
            yield (
                f"log.trackers[{i}] must be one of {known}, or module:Class for a tracker of your "
                f"own, not '{name}'"
            )
        if name in log.trackers[:i]:
            yield f"log.trackers names {name} twice"
