"""Estimates the duration of a step."""

import time
from collections.abc import Callable

from engine.protocol.rank_messages import Phase


class StepTimer:
    """Estimates how long a step takes and when the current one is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the clock of a step; `clock` returns seconds."""
        self._clock = clock
        self.step_seconds: float | None = None
        """Moving average over the latest steps; None before the first step is done."""
        self.restart()

    def restart(self) -> None:
        """Starts the clock of a step."""
        self._began = self._clock()
        self._optimise_began: float | None = None
        self._optimise_ends: float | None = None

    def finish_step(self, measured: float | None = None) -> None:
        """Adds a finished step to the average and starts the clock of the next one.

        Args:
            measured: seconds to use in place of the clock's, such as after a pause.
        """
        taken = self._clock() - self._began if measured is None else measured
        self.restart()
        before = self.step_seconds
        self.step_seconds = taken if before is None else 0.7 * before + 0.3 * taken

    def phase(self, phase: Phase) -> None:
        """Takes the progress of rank 0 into account.

        Uses only `optimise`, the last phase, in which each response takes about the same time. Its
        length depends on `ppo.epochs`, which may have changed since the averaged steps.
        """
        if phase.rank != 0 or phase.name != "optimise":
            return
        now = self._clock()
        if self._optimise_began is None or not phase.done:
            self._optimise_began = now
        elif phase.total:
            left = (now - self._optimise_began) * (phase.total / phase.done - 1)
            self._optimise_ends = now + left

    def remaining(self) -> float | None:
        """Estimated seconds until the current step is done; None if nothing is known yet."""
        ends = self._optimise_ends
        if ends is None and self.step_seconds is not None:
            ends = self._began + self.step_seconds
        return None if ends is None else max(0.0, ends - self._clock())
