"""The checkpoints of a session from which an attempt can start."""

from collections.abc import Sequence

import msgspec

from engine.errors import NoSuchSessionError, UserInputError
from engine.examined import examined
from engine.journal.logs.checkpoint_log import AdoptedCheckpoint
from engine.journal.reader import JournalReader
from engine.journal.rows import CHECKPOINT_STATUSES
from engine.launch.start_options import StartOptions
from engine.protocol.commands import Rollback
from engine.session.checkpoints import (
    AVERAGED_POLICY,
    checkpoint_path,
    complete_checkpoints,
    read_summary,
)
from engine.session.folder import SessionFolder


def checkpoint_steps(session: SessionFolder) -> list[int]:
    """The steps of all complete checkpoints on disk, in order."""
    return list(complete_checkpoints(session.checkpoints))


def timeline_checkpoints(session: SessionFolder) -> list[int]:
    """The steps of the complete checkpoints that a run can resume from: those of its timeline.

    A checkpoint of an abandoned branch is left out: the journal's steps before it are missing or
    belong to another branch.
    """
    with JournalReader(session) as reader:
        # `written` is enough: the COMPLETE file follows the journal's confirmation.
        known = {c.step for c in reader.checkpoints(("complete", "written"))}
    return [step for step in checkpoint_steps(session) if step in known]


def check_step(session: SessionFolder, step: int, steps: Sequence[int]) -> None:
    """Requires a checkpoint of a step among those of `steps`. Raises NoSuchSessionError."""
    if step not in steps:
        available = ", ".join(map(str, steps)) or "none yet"
        raise NoSuchSessionError(
            f"session '{session.name}' has no checkpoint of step {step} (it has: {available})"
        )


def resumable_checkpoints(session: SessionFolder) -> list[int]:
    """The steps that a resume can name: those of the timeline, and those unknown to the journal.

    A journal that was restored from a copy lacks the newest checkpoints.
    """
    return sorted({*timeline_checkpoints(session), *unknown_checkpoints(session)})


def unknown_checkpoints(session: SessionFolder, after: int = 0) -> list[int]:
    """The steps of complete checkpoints that the journal does not have, after a step."""
    with JournalReader(session) as reader:
        known = {row.step for row in reader.checkpoints(CHECKPOINT_STATUSES)}
    return [step for step in checkpoint_steps(session) if step > after and step not in known]


def missing_checkpoints(session: SessionFolder, after: int = 0) -> list[int]:
    """The steps of complete checkpoints of the timeline that are not on disk, after a step."""
    on_disk = checkpoint_steps(session)
    with JournalReader(session) as reader:
        steps = [row.step for row in reader.checkpoints(("complete",))]
    return [step for step in steps if step > after and step not in on_disk]


def all_lost(session: SessionFolder) -> str | None:
    """Says that the journal has checkpoints and the disk none of them; None if that is not so.

    Their disk may not be mounted. A run that began at step 0 would abandon them.
    """
    missing = missing_checkpoints(session)
    if not missing or timeline_checkpoints(session):
        return None
    steps = ", ".join(map(str, missing))
    return (
        f"the journal of session '{session.name}' has checkpoints (of steps {steps}), and none of "
        f"them is in {session.checkpoints}: is a disk not mounted? Restore one, or begin a new run "
        f"with {session.config_file}"
    )


def has_history(session: SessionFolder) -> bool:
    """Whether the session's journal holds an attempt; False if it is missing or empty."""
    with JournalReader(session) as reader:
        return bool(reader.attempts())


def last_checkpoint(session: SessionFolder) -> int:
    """The step of the newest complete checkpoint of the timeline; 0 if there is none."""
    return max(timeline_checkpoints(session), default=0)


def unfinished_rollback(session: SessionFolder) -> Rollback | None:
    """The roll back that was applied when the engine was killed, before its attempt began.

    Returns:
        None if there is none, or its checkpoint is no longer there.
    """
    with JournalReader(session) as reader:
        attempt = max((a.attempt for a in reader.attempts()), default=0)
        applied = [
            c
            for c in reader.commands()
            if (c.command, c.status, c.attempt) == (Rollback.name(), "applied", attempt)
        ]
    if not applied:
        return None
    command = msgspec.convert(applied[-1].args, examined(Rollback))
    return command if command.step in timeline_checkpoints(session) else None


def needed_checkpoints(session: SessionFolder) -> set[int]:
    """The steps of the checkpoints that a resume may continue from.

    They are the last one of the timeline, and that of a roll back whose attempt has not begun.
    """
    rollback = unfinished_rollback(session)
    steps = {last_checkpoint(session)}
    return steps if rollback is None else steps | {rollback.step}


def earlier_checkpoint(session: SessionFolder, start: StartOptions) -> StartOptions | None:
    """The same start, but from the previous checkpoint, because its own is damaged.

    Returns:
        None if there is no earlier checkpoint of the timeline, or an operator chose the step.
    """
    earlier = [step for step in timeline_checkpoints(session) if step < start.from_step]
    if start.fresh or not earlier:
        return None
    return msgspec.structs.replace(start, from_step=earlier[-1])


def adopted_checkpoint(session: SessionFolder, step: int) -> AdoptedCheckpoint | None:
    """Describes a complete checkpoint that is missing from the journal.

    Returns:
        None if there is no such checkpoint, or the journal has it.
    """
    if step not in checkpoint_steps(session) or step in timeline_checkpoints(session):
        return None
    folder = checkpoint_path(session.checkpoints, step)
    numbers = read_summary(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return AdoptedCheckpoint(size=size, score=numbers.score, kl=numbers.kl)


def check_average(session: SessionFolder, step: int) -> None:
    """Checks that a checkpoint has an averaged policy. Raises UserInputError."""
    if not (checkpoint_path(session.checkpoints, step) / AVERAGED_POLICY).is_dir():
        raise UserInputError(
            f"--ema: the checkpoint of step {step} has no averaged policy; train with "
            "train.ema.decay to get one"
        )
