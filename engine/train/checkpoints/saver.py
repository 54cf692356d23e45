"""Saves checkpoints in the background: training waits only for a copy to host memory.

Every rank has a saver, whose background thread writes the rank's share. After each stage the savers
exchange their results over a process group of their own, separate from training. If one rank fails,
the save fails on all ranks.
"""

import contextlib
import copy
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.errors import CheckpointError, error_text
from engine.session.access import make_folders
from engine.session.checkpoints import AVERAGED_POLICY, POLICY, checkpoint_path
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints import shards
from engine.train.checkpoints.folder import MetricValue, SavedState, StateFile
from engine.train.checkpoints.host_copy import HostCopies
from engine.train.checkpoints.policy_folder import policy_files, policy_tensors, write_policy
from engine.train.checkpoints.shards import AVERAGE
from engine.train.distributed.exchange import all_gather_bytes
from engine.train.models.language_model import AnyModel, LanguageModel

T = TypeVar("T")
TRAINING = "training"
"""Folder of what only a resume needs."""
FAILURES = (CheckpointError, OSError, SafetensorError)
"""Errors that fail a save. Any other exception is a bug and ends the run."""


@dataclass(frozen=True)
class SavedModels:
    """What the tensors of a checkpoint are read from."""

    policy: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    optimiser: torch.optim.Optimizer
    """The policy's."""
    reference: AnyModel | None = None
    """Given if it is no longer the model that the configuration names."""
    average: dict[str, Tensor] | None = None
    """The averaged policy (`train.ema`), by the names of the policy's tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, without copying. Those of a part begin with its name, as `policy/`.

        A sharded policy is resharded.
        """
        parts = {
            POLICY: policy_tensors(self.policy),
            TRAINING: shards.training_tensors(self.policy, self.optimiser),
            AVERAGE: self.average or {},
        }
        if self.reference is not None:
            parts[TRAINING] |= shards.reference_tensors(self.reference)
        return {f"{part}/{k}": t for part, tensors in parts.items() for k, t in tensors.items()}


@dataclass(frozen=True)
class SavedMetrics:
    """What a checkpoint records of its step's metrics."""

    score: float
    """Mean score."""
    kl: float
    """KL to the reference, in nats per response."""
    best: MetricValue | None = None
    """`train.best_metric`."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been published and confirmed."""

    step: int
    folder: Path
    size: int
    """In bytes."""
    metrics: SavedMetrics
    seconds: float
    """From the start of the copy to the rename."""


Outcome = Saved | CheckpointError


@dataclass(frozen=True)
class _Job:
    """What a save writes, captured by :meth:`Saver.begin`."""

    began: float
    content: StateFile
    metrics: SavedMetrics
    policy: LanguageModel
    """Used for its structure only."""
    policy_tensors: dict[str, Tensor]
    training_tensors: dict[str, Tensor]
    average: dict[str, Tensor]
    """The averaged policy, by the names of the policy's tensors."""
    early_error: OSError | None
    """Raised while the save was prepared."""
    averaged: bool
    """Whether there is an averaged policy; a rank may have none of its tensors to write."""


class _Folders:
    """Where a save writes, until its checkpoint is whole."""

    def __init__(self, part: Path) -> None:
        self.part = part
        """Renamed to the checkpoint's name once complete."""
        self.training = part / TRAINING
        self.policy = part / POLICY
        self.policy_shards = part / "policy-shards"
        """The policy of several ranks, removed once it is a model."""
        self.average = part / AVERAGE
        self.average_policy = part / AVERAGED_POLICY

    def files(self) -> list[str]:
        """The files that were written, by their names in the checkpoint."""
        return [str(f.relative_to(self.part)) for f in sorted(self.part.rglob("*")) if f.is_file()]


class Saver:
    """Writes one checkpoint at a time. All ranks must begin the same saves in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup | None = None,
        conclude: Callable[[int, Outcome], None] | None = None,
        confirm: Callable[[Saved], None] | None = None,
        notice: Callable[[str], None] = lambda _text: None,
        aside: Callable[[int], Path | None] = lambda _step: None,
        check_place: Callable[[], None] = lambda: None,
    ) -> None:
        """Initialises a saver.

        Args:
            checkpoints: the session's folder of checkpoints, on a file system shared by all ranks.
            group: a gloo group of all ranks for the exclusive use of the saver; None for one rank.
            conclude: called in rank 0's thread with the step and the outcome, before the save
                counts as finished. :meth:`poll` and :meth:`wait` raise its exceptions.
            confirm: the last stage of a save, called in rank 0's thread: marks the published
                checkpoint as complete. Like that of any other stage, its OSError fails the save.
            notice: called on rank 0 with a sentence if checkpoints lack the tokenizer.
            aside: where an earlier checkpoint of a step is moved; None if it is removed.
            check_place: called on rank 0 before anything in the folder is replaced; raises
                CheckpointError if it is no longer that of the session, and OSError if that cannot
                be seen.
        """
        self._checkpoints = checkpoints
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._conclude = conclude
        self._confirm = confirm
        self._notice = notice
        self._aside = aside
        self._check_place = check_place
        self._files: dict[str, bytes] = {}
        self._host_copies = HostCopies()
        self._running: Future[Outcome] | None = None
        self._reported = True

    def begin(self, state: SavedState, models: SavedModels, metrics: SavedMetrics) -> None:
        """Copies all tensors to host memory and starts to write them in the background.

        Waits for the previous save first. :meth:`poll` and :meth:`wait` report the outcome,
        including errors.

        Args:
            state: the state to save; copied.
            models: what is saved with it; copied.
            metrics: those of the last step.
        """
        self.wait()
        began = time.monotonic()
        tensors = models.tensors()
        early_error: OSError | None = None
        if not self._files and self._rank == 0:
            try:
                self._files = policy_files(models.policy, models.tokenizer, self._notice)
            except OSError as error:  # raised in the first stage, on all ranks
                early_error = error
        copies = self._host_copies.copy(shards.share(tensors, self._group))
        content = StateFile(
            state=copy.deepcopy(state),
            score=metrics.score,
            kl=metrics.kl,
            best=metrics.best,
            torch=str(torch.__version__),
            optimiser=shards.optimiser_kind(models.optimiser),
            hashes={},
        )
        policy_copies, training_copies, average_copies = (
            {k.removeprefix(part): t for k, t in copies.items() if k.startswith(part)}
            for part in (f"{POLICY}/", f"{TRAINING}/", f"{AVERAGE}/")
        )
        job = _Job(
            began, content, metrics, models.policy, policy_copies, training_copies, average_copies,
            early_error, averaged=models.average is not None,
        )  # fmt: skip
        future: Future[Outcome] = Future()
        self._running, self._reported = future, False
        # A daemon thread does not keep the process alive while it waits for a lost peer.
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
        """Returns the outcome of a finished save once, otherwise None. Never waits.

        All ranks get the same outcome, but possibly in different steps. Take decisions that must be
        the same on all ranks after :meth:`wait` instead.
        """
        if self._running is None or self.busy or self._reported:
            return None
        self._reported = True
        return self._running.result()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Waits for the save in flight, at most `timeout` seconds.

        Returns:
            The outcome of the last save, the same on every rank. None if there was no save, or if
            it is still running.
        """
        if self._running is None:
            return None
        if wait([self._running], timeout).not_done:
            return None
        self._reported = True
        return self._running.result()

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for the save in flight. Does not raise its errors."""
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
                final = checkpoint_path(self._checkpoints, step)
                if self._rank == 0:
                    with contextlib.suppress(CheckpointError, OSError):
                        self._check_place()
                        shutil.rmtree(checkpoint_folder.part_of(final), ignore_errors=True)
                outcome = error
            if self._rank == 0 and self._conclude is not None:
                self._conclude(step, outcome)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(outcome)

    def _write(self, job: _Job) -> Saved:
        """Runs the stages of a save. Raises CheckpointError on all ranks if one rank fails."""
        content = job.content
        final = checkpoint_path(self._checkpoints, content.state.step)
        folders = _Folders(checkpoint_folder.part_of(final))

        need = sum(self._on_all_ranks(final, lambda: self._needed_bytes(job)))
        self._on_rank_0(final, lambda: self._prepare(job, folders, need))
        try:
            self._save_shards(job, folders)
        except CheckpointError as error:
            raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
        files = self._on_rank_0(final, lambda: self._assemble_policy(job, folders))

        def sync_share() -> dict[str, str]:
            share = files[self._rank :: self._ranks]
            return {name: checkpoint_folder.sync_and_hash(folders.part / name) for name in share}

        for hashes in self._on_all_ranks(final, sync_share):
            content.hashes |= hashes
        content.hashes = dict(sorted(content.hashes.items()))
        size = self._on_rank_0(final, lambda: self._publish(folders, final, content))
        saved = Saved(
            step=content.state.step,
            folder=final,
            size=size,
            metrics=job.metrics,
            seconds=time.monotonic() - job.began,
        )
        confirm = self._confirm
        if confirm is not None:
            self._on_rank_0(final, lambda: confirm(saved))
        return saved

    # -- the stages of a save ------------------------------------------------------------------

    def _needed_bytes(self, job: _Job) -> int:
        """Bytes on disk for this rank's share."""
        # With several ranks the policy is on disk twice for a while: as shards and as a model.
        copies = 1 if self._group is None else 2
        policy = copies * shards.local_bytes(job.policy_tensors)
        average = 2 * shards.local_bytes(job.average)  # to resume from, and as a model
        return shards.local_bytes(job.training_tensors) + policy + average

    def _prepare(self, job: _Job, folders: _Folders, need: int) -> None:
        """Creates the folders if all ranks can save and the disk has room."""
        if job.early_error is not None:
            raise job.early_error
        self._check_place()
        checkpoint_folder.clear_interrupted(self._checkpoints)
        checkpoint_folder.check_space(self._checkpoints, need)
        averages = (folders.average, folders.average_policy) if job.averaged else ()
        for folder in (folders.training, folders.policy, folders.policy_shards, *averages):
            make_folders(folder)

    def _publish(self, folders: _Folders, final: Path, content: StateFile) -> int:
        """Moves a written checkpoint to its place; returns its size in bytes."""
        self._check_place()
        aside = self._aside(content.state.step)
        return checkpoint_folder.publish(folders.part, final, content, aside)

    def _save_shards(self, job: _Job, folders: _Folders) -> None:
        """Writes this rank's shards; all ranks call it together. Raises CheckpointError."""
        shards.save_shards(folders.training, job.training_tensors, self._group)
        if self._group is not None:
            shards.save_shards(folders.policy_shards, job.policy_tensors, self._group)
        if job.averaged:
            shards.save_shards(folders.average, job.average, self._group)

    def _assemble_policy(self, job: _Job, folders: _Folders) -> list[str]:
        """Writes the policy as a model; returns the names of all files. Called on rank 0."""
        tensors, averaged = job.policy_tensors, job.average
        if self._group is not None:
            tensors = shards.read_unsharded(folders.policy_shards)
        write_policy(folders.policy, job.policy, tensors, self._files)
        shutil.rmtree(folders.policy_shards)
        if job.averaged:
            if self._group is not None:
                averaged = shards.read_unsharded(folders.average)
            write_policy(folders.average_policy, job.policy, averaged, self._files)
        return folders.files()

    # -- agreement of the ranks ----------------------------------------------------------------

    def _on_rank_0(self, final: Path, act: Callable[[], T]) -> T:
        """Calls a function on rank 0 and returns its result on all ranks."""
        results = self._on_all_ranks(final, lambda: act() if self._rank == 0 else None)
        return cast("T", results[0])

    def _on_all_ranks(self, final: Path, act: Callable[[], T]) -> list[T]:
        """Calls a function on every rank and returns all results, by rank.

        Results are numbers, text, lists and dicts: they are sent in MessagePack.

        Raises:
            CheckpointError: any rank failed; raised on all ranks.
        """
        result: T | None = None
        raised: Exception | None = None
        problem = ""
        try:
            result = act()
        except Exception as error:  # raised below, after the exchange with the other ranks
            raised, problem = error, error_text(error) or repr(error)
            if not isinstance(error, CheckpointError):
                problem = f"cannot write the checkpoint {final}: {problem}"
        gathered: list[tuple[T | None, str]] = [(result, problem)]
        if self._group is not None:
            data = msgspec.msgpack.encode((result, problem))
            parts = all_gather_bytes(data, self._group)
            gathered = [msgspec.msgpack.decode(part) for part in parts]
        if raised is not None and not isinstance(raised, FAILURES):
            raise raised
        for _, text in gathered:
            if text:
                raise CheckpointError(text) from raised
        return [cast("T", result) for result, _ in gathered]
