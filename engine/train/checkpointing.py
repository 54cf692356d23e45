"""A run's checkpoints: when one is due, what the run waits for, and which older ones make way."""

import contextlib
import logging
import math
import time
from pathlib import Path

import msgspec

from engine.errors import CheckpointError, RlhfError
from engine.protocol.rank_messages import Begin, CheckpointComplete, CheckpointWritten, Notice
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.folder import SavedState
from engine.train.checkpoints.saver import Outcome, Saved, Saver
from engine.train.link import Link
from engine.train.models.language_model import fingerprint
from engine.train.run import Run

log = logging.getLogger("engine")

REPORT = 2.0
"""Seconds between signs of life while a checkpoint is waited for."""
CLOSE_TIMEOUT = 30.0
"""Seconds a save in flight is given when the run fails."""


def settings_digest(state: SavedState) -> bytes:
    """What all ranks must agree on before a save, as bytes to compare.

    Beta is left out: the controller's last bit may differ between unlike processors until rank 0
    broadcasts its own.
    """
    settings = msgspec.structs.replace(state.settings, beta=0.0)
    return msgspec.msgpack.encode((state.step, state.episodes, state.sampling_seed, settings))


class CheckpointManager:
    """Saves beside the training, one checkpoint at a time."""

    def __init__(self, folder: Path, run: Run, link: Link, begin: Begin) -> None:
        """Saves nothing yet.

        Args:
            folder: of the checkpoints.
            run: what is saved.
            link: to the supervisor, which must confirm each.
            begin: whose checkpoint the run goes on from, and which others are of its timeline.
        """
        self._folder = folder
        self._run = run
        self._link = link
        self._saver = Saver(
            folder, run.ranks.checkpoint_group, conclude=self._conclude, confirm=self._confirm
        )
        self._saved = begin.from_step
        """The step whose checkpoint was begun last."""
        self._timeline = set(begin.checkpoints)
        """Steps of this timeline's checkpoints, those that made way included."""
        self._score = self._kl = math.nan
        self._seconds = 0.0

    def poll(self) -> None:
        """Raises what must not happen in saving, where it did."""
        self._saver.poll()

    def step_done(self, score: float, kl: float) -> float:
        """Notes what is told beside the next checkpoint; the seconds saving took since the last."""
        self._score, self._kl = score, kl
        taken, self._seconds = self._seconds, 0.0
        return taken

    def save_if_due(self) -> None:
        """At every `save_every` steps a save begins; a failure is a notice, the run goes on."""
        every = self._run.config.train.save_every
        if every and self._run.state.step % every == 0:
            self._begin_save()

    def save(self) -> str | None:
        """A whole checkpoint of the last step, waited for; returns what prevented it."""
        step = self._run.state.step
        if self._saved == step and self._wait_for_save() is None:
            return None
        self._begin_save()
        return self._wait_for_save()

    def _begin_save(self) -> None:
        """Copies what is saved; the writing goes on beside the next steps."""
        run, state = self._run, self._run.state
        self._wait_for_save()  # the one before
        self._compare_ranks()
        self._link.phase(state.step, "checkpoint")
        began = time.monotonic()
        self._saver.begin(
            run.saved_state(), run.policy, run.tokenizer, run.optimiser,
            score=self._score, kl=self._kl,
        )  # fmt: skip
        self._saved = state.step
        self._seconds += time.monotonic() - began

    def _compare_ranks(self) -> None:
        """All ranks must agree on step and settings; otherwise the checkpoint would mix states.

        Raises:
            RlhfError: they differ, which must never happen.
        """
        ranks, state = self._run.ranks, self._run.state
        if ranks.size == 1:
            return
        if len(set(ranks.all_gather_bytes(settings_digest(self._run.saved_state())))) > 1:
            raise RlhfError(f"the ranks have come apart by step {state.step}; resume the run")
        # Whole on each rank, the weights agree to the last bit where the processors are alike.
        weights = fingerprint(self._run.policy) if self._run.strategy == "ddp" else ""
        if len(set(ranks.all_gather_bytes(weights.encode()))) > 1:
            text = "look here: the ranks' weights are no longer the same to the last bit"
            self._link.send(Notice(step=state.step, rule="ranks", text=text))

    def _wait_for_save(self) -> str | None:
        """Until no save is in flight; what prevented the last one."""
        began = time.monotonic()
        while self._saver.busy:
            self._link.phase(self._run.state.step, "checkpoint")
            self._saver.wait(REPORT)
        self._seconds += time.monotonic() - began
        outcome = self._saver.wait()
        return str(outcome) if isinstance(outcome, CheckpointError) else None

    def _confirm(self, saved: Saved) -> None:
        """Called beside the training, when a checkpoint is in its place.

        At once, not at the next boundary: a step can take minutes, and a checkpoint that is on disk
        should serve whoever must go on after a crash in it.
        """
        self._link.send(
            CheckpointWritten(step=saved.step, size=saved.size, score=saved.score, kl=saved.kl)
        )
        self._link.confirm(saved.step)
        checkpoint_folder.complete(saved.folder)

    def _conclude(self, step: int, outcome: Outcome) -> None:
        """Called beside the training, when a checkpoint is whole or could not be written."""
        if isinstance(outcome, CheckpointError):
            self._link.send(Notice(step=step, rule="checkpoint", text=str(outcome)))
            return
        removable = self._removable(step, outcome.score)
        # Told first: an end between the two leaves a folder too many, not one too few.
        self._link.send(CheckpointComplete(step=step, removed=removable))
        for other in removable:
            self._remove(other, step)
        log.info(
            "checkpoint of step %d: %.1f MB in %.1f s", step, outcome.size / 1e6, outcome.seconds
        )

    def _removable(self, now: int, score: float) -> list[int]:
        """Older checkpoints that make way for the one just written.

        Of this timeline alone: those of one that was left take no places, and stay until one of
        the same step replaces them, since somebody may have saved them by hand. So does one that
        cannot be read.
        """
        train, scores = self._run.config.train, {now: score}
        for step, folder in checkpoint_folder.completed(self._folder).items():
            if step in self._timeline and step < now:
                with contextlib.suppress(CheckpointError):
                    scores[step] = checkpoint_folder.read_score(folder)
        self._timeline.add(now)
        return checkpoint_folder.to_remove(scores, train.keep_last, train.keep_best)

    def _remove(self, step: int, now: int) -> None:
        """Makes room; what cannot be removed costs nothing but its room, and the run goes on."""
        try:
            checkpoint_folder.remove(checkpoint_folder.folder_of(self._folder, step))
        except OSError as error:
            text = f"look here: the old checkpoint of step {step} cannot be removed: {error}"
            self._link.send(Notice(step=now, rule="checkpoint", text=text))

    def close(self) -> None:
        """Lets a save in flight finish when a step has failed: a resume can go on from it."""
        self._saver.close(CLOSE_TIMEOUT)
