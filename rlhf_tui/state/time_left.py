"""Time left of a step and of a run, for the dashboard and the CLI."""

SMOOTHING = 0.9
"""Weight of the past in :class:`StepSeconds`."""


def until_end(step: int, total_steps: int, step_seconds: float) -> float:
    """Seconds until the last step is done, at `step_seconds` a step."""
    return max(0, total_steps - step) * step_seconds


def about(seconds: float | None) -> str:
    """`~12s`, in whole seconds; empty if the time is unknown or there is none left."""
    return f"~{seconds:.0f}s" if seconds else ""


class StepSeconds:
    """Exponential moving average of the seconds of a step."""

    def __init__(self) -> None:
        self.mean: float | None = None
        """None before the first step."""

    def add(self, seconds: float) -> None:
        """Adds a step."""
        before = self.mean
        self.mean = seconds if before is None else SMOOTHING * before + (1 - SMOOTHING) * seconds
