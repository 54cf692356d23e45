"""Time left of a step and of a run, for the dashboard and the CLI."""

from engine.protocol.rank_messages import Phase

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


class OptimiseEnd:
    """Estimates when `optimise`, the last phase of a step but evaluation and checkpoint, ends.

    Its responses take about the same time each. Its length depends on `ppo.epochs`, which may have
    changed since the steps of a mean.
    """

    def __init__(self) -> None:
        self.ends: float | None = None
        """None if no `optimise` runs, or before the first of its responses are done."""
        self._step: int | None = None
        self._first = self._done = 0
        self._since = 0.0

    def take(self, phase: Phase, now: float) -> None:
        """Takes the progress of a rank, at `now` in seconds."""
        if phase.name != "optimise":
            self.ends, self._step = None, None
        elif phase.step != self._step:  # some may be done already
            self.ends, self._step, self._since = None, phase.step, now
            self._first = self._done = phase.done
        elif phase.done > self._done:
            self._done = phase.done
            seconds = (now - self._since) / (phase.done - self._first)
            self.ends = now + seconds * (phase.total - phase.done)
