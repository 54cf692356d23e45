"""Saves a run's checkpoints in the background and removes older ones."""

import contextlib
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from engine.errors import CheckpointError, RlhfError
from engine.metrics import KL, SCORE
from engine.protocol.rank_messages import (
    Begin,
    CheckpointComplete,
    CheckpointKept,
    CheckpointWritten,
    Notice,
)
from engine.session.checkpoints import (
    aside_path,
    checkpoint_path,
    complete_checkpoints,
    mark_complete,
    remove,
)
from engine.session.file_signature import file_id
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.folder import MetricValue, SavedState
from engine.train.checkpoints.saver import Outcome, Saved, SavedMetrics, Saver
from engine.train.link import Link
from engine.train.models.language_model import fingerprint
from engine.train.run import Run

log = logging.getLogger("engine")

REPORT_INTERVAL = 2.0
"""Seconds between `checkpoint` messages while waiting for a save."""
REMOVAL_PATIENCE = 60.0
"""Most seconds to wait for the journal to record a removal before removing old checkpoints."""
CLOSE_TIMEOUT = 30.0
"""Seconds that a running save may take to finish when the run fails."""


def settings_digest(state: SavedState) -> bytes:
    """Serialises the state that must be equal on all ranks before a save, for comparison.

    Omits beta: on different processors, the controller's result may differ in the last bit until
    rank 0 broadcasts its own at the next boundary.
    """
    settings = msgspec.structs.replace(state.settings, beta=0.0)
    return msgspec.msgpack.encode((state.step, state.episodes, state.sampling_seed, settings))


class CheckpointManager:
    """Saves checkpoints while training continues, one at a time. All ranks call it together."""

    def __init__(self, folder: Path, run: Run, link: Link, begin: Begin) -> None:
        """Creates a manager; saves nothing yet. Removes what a killed process left in the folder.

        Args:
            folder: the session's checkpoint folder.
            run: the run to save.
            link: the connection to the supervisor, which confirms each checkpoint before it becomes
                complete.
            begin: the step the run starts from, and the checkpoints of its branch.
        """
        self._folder = folder
        self._journal = begin.journal
        self._run = run
        self._link = link
        self._saver = Saver(
            folder,
            run.ranks.checkpoint_group,
            conclude=self._conclude,
            confirm=self._confirm,
            notice=lambda text: self._notice(run.state.step, text),
            aside=self._aside,
            check_place=self._check_place,
        )
        self._saved_step = begin.from_step
        """The step of the last save that was started."""
        self._branch = set(begin.checkpoints)
        """Steps of the checkpoints on this branch of the run, including removed ones."""
        self._kept = set(begin.kept)
        """Steps of those that an operator saved, or wanted to."""
        self._kept_aside = dict(begin.kept_aside)
        """Step → attempt of those that an operator saved on abandoned branches. The attempt is 0
        for those that the journal does not have."""
        self._metrics = SavedMetrics(math.nan, math.nan)
        """Those of the last step."""
        self._recorded = dict(begin.best)
        """`train.best_metric` by step, also of evaluations that a checkpoint does not have."""
        self._alerts: list[int] = []
        """The first steps of alerts that have not cleared, as of the last confirmation."""
        self._seconds = 0.0
        """Seconds that saving has blocked training since the last step."""
        self._longest_save = 0.0
        self._moved = ""
        """What the operator is told once the save in flight has moved a checkpoint aside."""
        self._failed_step: int | None = None
        """The step whose save failed last, of which the operator has been notified."""
        if run.ranks.is_lead:  # a run that only records its end saves no more
            with contextlib.suppress(OSError, CheckpointError):
                self._check_place()
                checkpoint_folder.clear_interrupted(folder)

    def _check_place(self) -> None:
        """Checks that the session's folder was not moved: another may be at its path.

        Raises:
            CheckpointError: it was.
            OSError: it cannot be looked at.
        """
        path = self._folder.with_name("journal.db")
        if self._journal is not None and file_id(path) != self._journal:
            raise CheckpointError(
                f"the folder {self._folder.parent} was moved, deleted or replaced: nothing is "
                "saved there"
            )

    def poll(self) -> None:
        """Raises the unexpected error of the saving thread, if there was one."""
        self._saver.poll()

    def step_done(self, metrics: dict[str, float]) -> float:
        """Records the metrics of a finished step for the next checkpoint; call it after each step.

        Returns:
            Seconds that saving has blocked training since the last call.
        """
        best = self._run.config.train.best_metric
        self._metrics = SavedMetrics(
            metrics[SCORE], metrics[KL], MetricValue(best, metrics.get(best))
        )
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Adds an evaluation to the metrics of the finished step, for its checkpoint.

        A checkpoint that is saved already stays as it is, because until a second one were complete,
        the step would have none. It is compared with others by this evaluation all the same.
        """
        best = self._run.config.train.best_metric
        if best in metrics:
            self._metrics = replace(self._metrics, best=MetricValue(best, metrics[best]))
            self._recorded[self._run.state.step] = metrics[best]

    def seconds_to_save(self) -> float:
        """Estimates the duration of :meth:`save` from the longest save so far; 0 before the first.

        Includes the time for a running save to end.
        """
        return self._longest_save * (2 if self._saver.busy else 1)

    def save_if_due(self) -> None:
        """Starts a save every `train.save_every` steps. Notifies the operator if it fails."""
        if self._run.config.train.saves_after(self._run.state.step):
            self._start_save()

    def has_begun_to_save(self, step: int) -> bool:
        """Whether the last save that was started is the one of this step."""
        return self._saved_step == step

    def save(self) -> str | None:
        """Saves the last step and waits until the checkpoint is complete.

        Returns:
            Why the checkpoint could not be written, or None on success.
        """
        step = self._run.state.step
        if self._saved_step == step and self._wait_for_save() is None:
            return None
        self._start_save()
        return self._wait_for_save()

    def save_and_keep(self) -> str | None:
        """Like :meth:`save`; the checkpoint stays until an operator deletes it."""
        step = self._run.state.step
        self._kept.add(step)  # before the save, which already removes older ones
        problem = self.save()
        if problem is None:
            self._link.send(CheckpointKept(step=step))
        return problem

    def _start_save(self) -> None:
        """Copies the state and starts writing it in the background."""
        run, state = self._run, self._run.state
        self._wait_for_save()  # for the previous save
        self._check_ranks_agree()
        self._link.phase(state.step, "checkpoint")
        started = time.monotonic()
        self._saver.begin(run.saved_state(), run.saved_models(), self._metrics)
        self._saved_step = state.step
        self._seconds += time.monotonic() - started

    def _check_ranks_agree(self) -> None:
        """Checks that all ranks agree on step and settings, so that the checkpoint mixes no states.

        Raises:
            RlhfError: they differ, which is a bug.
        """
        ranks, state = self._run.ranks, self._run.state
        if ranks.size == 1:
            return
        if len(set(ranks.all_gather_bytes(settings_digest(self._run.saved_state())))) > 1:
            raise RlhfError(f"the ranks' states differ at step {state.step}; resume the run")
        # Under DDP each rank has all weights. On equal processors they are bitwise equal.
        weights = fingerprint(self._run.policy) if self._run.strategy == "ddp" else ""
        if len(set(ranks.all_gather_bytes(weights.encode()))) > 1:
            text = "the ranks' weights are no longer bitwise equal"
            self._link.send(Notice(step=state.step, rule="ranks", text=text))

    def _wait_for_save(self) -> str | None:
        """Waits for a running save; returns why the last one failed, or None."""
        started = time.monotonic()
        while self._saver.busy:
            self._link.phase(self._run.state.step, "checkpoint")
            self._saver.wait(REPORT_INTERVAL)
        self._seconds += time.monotonic() - started
        outcome = self._saver.wait()
        return str(outcome) if isinstance(outcome, CheckpointError) else None

    def _confirm(self, saved: Saved) -> None:
        """Marks a checkpoint COMPLETE once the journal is complete; called in the saving thread.

        This does not wait for the next boundary, because a step can take minutes. If it crashes,
        the run can resume from a checkpoint that is already on disk.
        """
        if self._moved:
            self._notice(saved.step, self._moved)
        self._link.send(
            CheckpointWritten(
                step=saved.step, size=saved.size, score=saved.metrics.score, kl=saved.metrics.kl
            )
        )
        confirm = self._link.wait_for_confirm(saved.step)
        self._alerts = [] if confirm is None else confirm.alerts
        mark_complete(saved.folder)

    def _conclude(self, step: int, outcome: Outcome) -> None:
        """Reports an outcome, then removes older checkpoints; called in the saving thread."""
        if isinstance(outcome, CheckpointError):
            if step != self._failed_step:
                self._notice(step, str(outcome))
            self._failed_step = step
            return
        self._longest_save = max(self._longest_save, outcome.seconds)
        removable = self._removable(step, outcome.metrics.best)
        # Recorded first: a crash in between leaves a spare folder instead of a missing one.
        self._link.send(CheckpointComplete(step=step, removed=removable))
        # Bounded: on a full disk the journal may be waiting for the space that the removal frees.
        confirm = self._link.wait_for_confirm(step, at_most=REMOVAL_PATIENCE)
        needed = [] if confirm is None else confirm.needed
        if confirm is None and checkpoint_folder.has_room(self._folder):
            # Another program locks the journal. A roll back may need one of them; the next save
            # removes the others.
            needed = removable
        for old_step in removable:
            if old_step not in needed:
                self._remove(old_step, step)
        log.info(
            "checkpoint of step %d: %.1f MB in %.1f s", step, outcome.size / 1e6, outcome.seconds
        )

    def _removable(self, saved_step: int, best: MetricValue | None) -> list[int]:
        """Selects older checkpoints to remove, by the keys `train.keep_…`.

        Checkpoints that an operator saved, and those of an abandoned branch, are neither counted
        nor removed; a new checkpoint of the same step replaces the latter. Unreadable checkpoints
        are also kept.
        """
        train, scored_by = self._run.config.train, self._run.state.scored_by
        scores = {saved_step: -math.inf if best is None else best.rank}
        for step, folder in complete_checkpoints(self._folder, lenient=True).items():
            if step in self._branch and step < saved_step:
                with contextlib.suppress(CheckpointError, OSError):
                    scores[step] = checkpoint_folder.read_best(
                        folder, train.best_metric, scored_by, self._recorded.get(step)
                    )
        self._branch.add(saved_step)
        alerts = self._alerts if train.keep_before_alert else []
        return checkpoint_folder.to_remove(
            scores, train.keep_last, train.keep_best, alerts, self._kept
        )

    def _remove(self, step: int, saved_step: int) -> None:
        """Removes a checkpoint. If that fails, notifies the operator and lets the run continue."""
        try:
            self._check_place()
            remove(checkpoint_path(self._folder, step))
        except (OSError, CheckpointError) as error:
            self._notice(
                saved_step, f"the old checkpoint of step {step} cannot be removed: {error}"
            )

    def _aside(self, step: int) -> Path | None:
        """Where a checkpoint is moved that an operator saved, or that the journal did not have."""
        self._moved = ""
        saved = complete_checkpoints(self._folder, lenient=True)
        if step not in self._kept_aside or step not in saved:
            return None
        attempt = self._kept_aside[step]
        path = aside_path(self._folder, step, attempt)
        origin = f" that was saved on an abandoned branch (attempt {attempt})"
        if not attempt:
            origin = ", which the journal did not have,"
        self._moved = f"the checkpoint of step {step}{origin} stays in {path}"
        return path

    def _notice(self, step: int, text: str) -> None:
        self._link.send(Notice(step=step, rule="checkpoint", text=text))

    def close(self) -> None:
        """Waits for a running save, at most :data:`CLOSE_TIMEOUT`, so that a resume can use it."""
        self._saver.close(CLOSE_TIMEOUT)
