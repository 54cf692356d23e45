"""Saves checkpoints beside the training: the step waits only for a copy to the host's memory.

Every rank has a saver. A background thread of each writes its share; they agree on every stage over
a process group of their own, so that what one of them meets is the outcome of all, and so that
their talk never mixes with the training's.
"""

import copy
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.errors import CheckpointError
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints import shards
from engine.train.checkpoints.folder import StateFile, TrainingState
from engine.train.checkpoints.host_copy import HostCopies
from engine.train.checkpoints.policy_folder import policy_files, policy_tensors, write_policy
from engine.train.models.language_model import LanguageModel

T = TypeVar("T")
FAILURES = (CheckpointError, OSError, SafetensorError)
"""What a disk can do to a save; anything else is a mistake of ours, and ends the run."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is in its place, and confirmed."""

    step: int
    folder: Path
    size: int
    """Bytes."""
    score: float
    kl: float
    seconds: float
    """From the copy to the last rename."""


Outcome = Saved | CheckpointError


@dataclass(frozen=True)
class _Job:
    """All that is written, as it was when the save began."""

    began: float
    content: StateFile
    policy: LanguageModel
    """For its structure only."""
    policy_tensors: dict[str, Tensor]
    training_tensors: dict[str, Tensor]
    trouble: OSError | None
    """What went wrong before the save had begun."""


class Saver:
    """Writes one checkpoint at a time; all ranks begin the same ones in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup | None = None,
        conclude: Callable[[int, Outcome], None] | None = None,
        confirm: Callable[[Saved], None] | None = None,
    ) -> None:
        """Makes a saver.

        Args:
            checkpoints: the session's folder of checkpoints; all ranks see the same.
            group: of all ranks, for the CPU (gloo), used by nobody else; None for a rank alone.
            conclude: called in rank 0's thread with the step and its outcome, before the save
                counts as finished. What it raises comes out of :meth:`poll` and :meth:`wait`.
            confirm: the last stage of a save, in rank 0's thread: marks as whole what is in its
                place. An OSError is the save's outcome, on all ranks, like that of any other stage.
        """
        self._checkpoints = checkpoints
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._conclude = conclude
        self._confirm = confirm
        self._files: dict[str, bytes] = {}
        self._host_copies = HostCopies()
        self._running: Future[Outcome] | None = None
        self._reported = True

    def begin(
        self,
        state: TrainingState,
        policy: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        optimiser: torch.optim.Optimizer,
        *,
        score: float,
        kl: float,
    ) -> None:
        """Copies everything to the host's memory, and has it written from there.

        Waits for the save before this one. Whatever goes wrong in writing is told by :meth:`poll`
        and :meth:`wait`.
        """
        self.wait()
        began = time.monotonic()
        wanted = {f"policy/{k}": t for k, t in policy_tensors(policy).items()}
        wanted |= {
            f"training/{k}": t for k, t in shards.training_tensors(policy, optimiser).items()
        }
        trouble: OSError | None = None
        if not self._files and self._rank == 0:
            try:
                self._files = policy_files(policy, tokenizer)
            except OSError as error:  # told like the rest: the other ranks have begun already
                trouble = error
        copies = self._host_copies.copy(shards.share(wanted, self._group))
        content = StateFile(
            state=copy.deepcopy(state),
            score=score,
            kl=kl,
            torch=str(torch.__version__),
            optimiser=shards.optimiser_kind(optimiser),
            hashes={},
        )
        policy_copies, training_copies = (
            {k.removeprefix(part): t for k, t in copies.items() if k.startswith(part)}
            for part in ("policy/", "training/")
        )
        job = _Job(began, content, policy, policy_copies, training_copies, trouble)
        future: Future[Outcome] = Future()
        self._running, self._reported = future, False
        # A daemon: a process that must end does not wait for a peer that is gone.
        threading.Thread(
            target=self._run,
            args=(job, future),
            name="checkpoint",
            daemon=True,
        ).start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._running is not None and not self._running.done()

    def poll(self) -> Outcome | None:
        """What came of the save that has finished since the last look; never waits.

        The same on every rank, though one may see it a step before another: what all must decide
        alike is decided after :meth:`wait`.
        """
        if self._running is None or self.busy or self._reported:
            return None
        self._reported = True
        return self._running.result()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Waits for the save in flight, at most `timeout` seconds.

        Returns:
            What came of the last save, the same on every rank; None where there was none, or it
            goes on still.
        """
        if self._running is None:
            return None
        if wait([self._running], timeout).not_done:
            return None
        self._reported = True
        return self._running.result()

    def close(self, timeout: float) -> None:
        """Gives the save in flight some seconds to finish; raises nothing."""
        if self._running is not None:
            wait([self._running], timeout)

    # -- in the background -------------------------------------------------------------------------

    def _run(self, job: _Job, future: Future[Outcome]) -> None:
        step = job.content.state.step
        outcome: Outcome
        try:
            try:
                outcome = self._write(job)
            except CheckpointError as error:
                final = checkpoint_folder.folder_of(self._checkpoints, step)
                if self._rank == 0:
                    shutil.rmtree(checkpoint_folder.part_of(final), ignore_errors=True)
                outcome = error
            if self._rank == 0 and self._conclude is not None:
                self._conclude(step, outcome)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(outcome)

    def _write(self, job: _Job) -> Saved:
        """Stage by stage, all ranks together. Raises CheckpointError, on all ranks alike."""
        content = job.content
        final = checkpoint_folder.folder_of(self._checkpoints, content.state.step)
        part = checkpoint_folder.part_of(final)
        training, policy, policy_shards = (
            part / name for name in ("training", "policy", "policy-shards")
        )

        held = shards.local_bytes(job.policy_tensors)
        # Among many ranks the policy lies there in shards as well, for a while.
        need = shards.local_bytes(job.training_tensors) + held * (1 if self._group is None else 2)
        need = sum(self._together(final, lambda: need))

        def prepare() -> None:
            if job.trouble is not None:
                raise job.trouble
            checkpoint_folder.check_space(self._checkpoints, need)
            checkpoint_folder.clear_parts(self._checkpoints)
            for folder in (training, policy, policy_shards):
                folder.mkdir(parents=True)

        self._first(final, prepare)
        try:
            shards.save_shards(training, job.training_tensors, self._group)
            if self._group is not None:
                shards.save_shards(policy_shards, job.policy_tensors, self._group)
        except CheckpointError as error:
            raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error

        def make_policy() -> list[Path]:
            whole = job.policy_tensors
            if self._group is not None:
                whole = shards.read_whole(policy_shards)
            write_policy(policy, job.policy, whole, self._files)
            shutil.rmtree(policy_shards)
            return [f for f in sorted(part.rglob("*")) if f.is_file()]

        def seal() -> dict[str, str]:
            mine = files[self._rank :: self._ranks]
            return {str(f.relative_to(part)): checkpoint_folder.sync_and_hash(f) for f in mine}

        files = self._first(final, make_policy)
        for hashes in self._together(final, seal):
            content.hashes |= hashes
        content.hashes = dict(sorted(content.hashes.items()))
        size = self._first(final, lambda: checkpoint_folder.publish(part, final, content))
        saved = Saved(
            step=content.state.step,
            folder=final,
            size=size,
            score=content.score,
            kl=content.kl,
            seconds=time.monotonic() - job.began,
        )
        confirm = self._confirm
        if confirm is not None:
            self._first(final, lambda: confirm(saved))
        return saved

    def _first(self, final: Path, act: Callable[[], T]) -> T:
        """Rank 0 does it, and all have the result."""
        done = self._together(final, lambda: act() if self._rank == 0 else None)
        return cast("T", done[0])

    def _together(self, final: Path, act: Callable[[], T]) -> list[T]:
        """Every rank does it: the results of all. One rank's failure is raised on all."""
        result: T | None = None
        raised: Exception | None = None
        problem = ""
        try:
            result = act()
        except Exception as error:  # raised below, once the others know
            raised, problem = error, str(error) or repr(error)
            if not isinstance(error, CheckpointError):
                problem = f"cannot write the checkpoint {final}: {problem}"
        found: list[tuple[T | None, str]] = [(result, problem)] * self._ranks
        if self._group is not None:
            dist.all_gather_object(found, (result, problem), group=self._group)
        if raised is not None and not isinstance(raised, FAILURES):
            raise raised
        for _, told in found:
            if told:
                raise CheckpointError(told) from raised
        return [cast("T", done) for done, _ in found]
