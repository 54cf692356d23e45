"""Rules of `log.trackers`: the names."""

from engine.config.rules.reward import names_a_function
from engine.config.sections.supervision import LogConfig
from engine.errors import ConfigError

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


def check_trackers(log: LogConfig) -> None:
    """Checks the names of the trackers. Raises ConfigError."""
    for i, name in enumerate(log.trackers):
        if name not in TRACKER_PACKAGES and not names_a_function(name):
            known = ", ".join(TRACKER_PACKAGES)
            raise ConfigError(
                f"log.trackers[{i}] must be one of {known}, or module:Class for a tracker of your "
                f"own, not '{name}'"
            )
        if name in log.trackers[:i]:
            raise ConfigError(f"log.trackers names {name} twice")
