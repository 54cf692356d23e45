"""Decides whether a run ends before the next step."""

import os
import time

from engine.config.deadline import deadline
from engine.train.checkpoints.manager import CheckpointManager
from engine.train.reports.trackers import CLOSE_TIMEOUT
from engine.train.run import Run

NO_TIME = ("deadline", "preempted", "leaving")
"""Reasons to end early that leave no time to wait."""


class EndCriteria:
    """Why a run ends, other than by a command.

    Ranks may measure and round differently, so what rank 0 finds of :attr:`reached` and
    :meth:`early_reason` is broadcast to all.
    """

    def __init__(self, run: Run, checkpoints: CheckpointManager, from_step: int) -> None:
        """Reads the deadline of the scheduler. `from_step`: that the attempt starts from."""
        self._run = run
        self._checkpoints = checkpoints
        self._from_step = from_step
        self._deadline = deadline(run.config.train, os.environ)
        self._longest_step = 0.0
        self.reached = False
        """Whether `train.stop_at` is met."""
        self.early = ""
        """Why the run must save and end before its last step, as in
        :class:`~engine.protocol.rank_messages.Ended`; else ""."""

    @property
    def has_no_time(self) -> bool:
        """Whether the run ends early and cannot wait, such as for room on the disk."""
        return self.early in NO_TIME

    def step_done(self, metrics: dict[str, float], seconds: float) -> None:
        """Takes the metrics and the duration of a finished step into account."""
        self._longest_step = max(self._longest_step, seconds)
        self.reached = self._has_reached_aim(metrics)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Takes an evaluation after :meth:`step_done` into account."""
        self.reached = self.reached or self._has_reached_aim(metrics)

    def reason(self) -> str | None:
        """Why no step follows, as in `Ended`; None if one does. The same on all ranks."""
        train, state = self._run.config.train, self._run.state
        if state.step >= train.steps:
            return "finished"
        if self.reached:
            return "stop_at"
        if train.max_hours is not None and state.seconds >= train.max_hours * 3600:
            return "max_hours"
        return self.early or None

    def early_reason(self) -> str:
        """Returns rank 0's reason to save and end before the next step; "" if there is none.

        `deadline`: there is no time left for the longest step and the longest save. `preempted`:
        another machine of the run is about to be taken away. `leaving`: the same, but the others
        can continue. `joining`: another machine wants to join, and the last step is being saved.
        """
        config, state, ranks = self._run.config, self._run.state, self._run.ranks
        needed = self._longest_step + self._checkpoints.seconds_to_save()
        needed += config.train.deadline_margin
        if config.log.trackers:
            needed += CLOSE_TIMEOUT  # the end of the run may wait this long for them
        if self._deadline is not None and self._deadline - time.time() < needed:
            return "deadline"
        if ranks.is_machine_leaving():
            return "preempted" if config.launch.min_nodes is None else "leaving"
        saved = state.step > self._from_step and self._checkpoints.has_begun_to_save(state.step)
        return "joining" if saved and ranks.is_machine_waiting() else ""

    def _has_reached_aim(self, metrics: dict[str, float]) -> bool:
        """Whether metrics meet `train.stop_at`."""
        aim = self._run.config.train.stop_at
        return aim is not None and aim.metric in metrics and aim.reached(metrics[aim.metric])
