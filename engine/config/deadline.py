"""The time by which a run must have saved, because its machine will be taken away."""

import math
from collections.abc import Mapping
from datetime import datetime

from engine.config.sections.train import TrainConfig
from engine.errors import ConfigError

SLURM_VARIABLE = "SLURM_JOB_END_TIME"
"""Unix time at which SLURM ends the job."""
EARLIEST_TIME = 1_000_000_000
"""Seconds: smaller numbers are no Unix time of a run, but for example `14:05`, which YAML reads as
14 × 60 + 5."""


def deadline(train: TrainConfig, environment: Mapping[str, str]) -> float | None:
    """The Unix time by which `train.save_before_deadline` wants the run to have saved.

    Args:
        train: the section.
        environment: of this process; a scheduler may have put the end of the job there.

    Returns:
        None if there is no deadline.

    Raises:
        ConfigError: the key is not a time.
    """
    value = train.save_before_deadline
    if value is None:
        return None
    if value == "auto":
        return _slurm_end(environment.get(SLURM_VARIABLE, ""))
    if isinstance(value, int) and value >= EARLIEST_TIME:
        return float(value)
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"train.save_before_deadline: {value} is not auto, null, a date and time in quotes "
            "such as '2027-01-31 14:05', or seconds since 1970"
        ) from None


def _slurm_end(text: str) -> float | None:
    """The variable as a time; None if it is not set or says that there is no limit."""
    try:
        end = float(text)
    except ValueError:
        return None
    return end if math.isfinite(end) and end >= EARLIEST_TIME else None
