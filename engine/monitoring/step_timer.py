"""Estimates when a step is done."""

import time
from collections.abc import Callable

from engine.protocol.rank_messages import Phase


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
        elif phase.step != self._step or phase.done < self._done:  # it began, or begins again
            self.ends, self._step, self._since = None, phase.step, now
            self._first = self._done = phase.done  # some may be done already
        elif phase.done > self._done:
            self._done = phase.done
            seconds = (now - self._since) / (phase.done - self._first)
            self.ends = now + seconds * (phase.total - phase.done)


class StepTimer:
    """Estimates how long a step takes and when the current one is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the clock of a step; `clock` returns seconds."""
        self._clock = clock
        self._step_seconds: float | None = None
        """Moving average over the latest steps; None before the first step is done."""
        self.restart()

    def restart(self) -> None:
        """Starts the clock of a step."""
        self._began = self._clock()
        self._optimise = OptimiseEnd()

    def finish_step(self, measured: float | None = None) -> None:
        """Adds a finished step to the average and starts the clock of the next one.

        Args:
            measured: seconds to use in place of the clock's, such as after a pause.
        """
        taken = self._clock() - self._began if measured is None else measured
        self.restart()
        before = self._step_seconds
        self._step_seconds = taken if before is None else 0.7 * before + 0.3 * taken

    def phase(self, phase: Phase) -> None:
        """Takes the progress of rank 0 into account."""
        if phase.rank == 0:
            self._optimise.take(phase, self._clock())

    def remaining(self) -> float | None:
        """Estimated seconds until the current step is done; None if nothing is known yet."""
        ends = self._optimise.ends
        if ends is None and self._step_seconds is not None:
            ends = self._began + self._step_seconds
        return None if ends is None else max(0.0, ends - self._clock())
