"""Deletes a checkpoint of a session without an engine; a live engine does it itself."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

from engine.errors import CommandRejectedError, JournalError, SessionError
from engine.journal.database import write_problem
from engine.journal.writer import JournalWriter
from engine.launch.start_checkpoints import checkpoint_steps, needed_checkpoints
from engine.protocol.client import new_id
from engine.protocol.commands import DeleteCheckpoint, check_deletable
from engine.session.checkpoints import aside_checkpoints, checkpoint_path, remove
from engine.session.folder import SessionFolder


def delete_checkpoint(
    session: SessionFolder,
    step: int,
    who: str,
    notice: Callable[[str], None] = lambda _text: None,
) -> None:
    """Deletes a checkpoint, holding the session's lock, and records that like the command.

    Args:
        session: of the checkpoint.
        step: of the checkpoint.
        who: the operator, for the journal.
        notice: called with a sentence before a wait.

    Raises:
        CommandRejectedError: there is no such checkpoint, or a resume would continue from it.
        JournalError: the journal cannot be read or written.
        SessionLockedError: the session has a live engine; the message names the command for it.
        SessionError: the session belongs to another user, or the files cannot be removed.
    """
    name = DeleteCheckpoint.name()
    lock = session.acquire(f"use its command: {session.command('ctl', name, str(step))}")
    folder, command_id = checkpoint_path(session.checkpoints, step), new_id()
    try:
        session.check_other_machine(notice)
        check_deletable(step, needed_checkpoints(session), checkpoint_steps(session))
        try:
            _record(session, command_id, step, who)
        except (JournalError, sqlite3.Error):
            remove(folder)  # on a full disk, this makes the room for the record
            _record(session, command_id, step, who)
        remove(folder)
    except sqlite3.Error as error:
        raise JournalError(
            f"cannot write {session.journal_file}: {write_problem(error)}"
        ) from error
    except OSError as error:
        raise SessionError(f"cannot remove the checkpoint of step {step}: {error}") from error
    finally:
        lock.release()


def delete_aside(session: SessionFolder, name: str) -> None:
    """Deletes a checkpoint of an abandoned branch that was moved aside; the journal has none.

    No engine needs it, so the session may be live.

    Args:
        session: of the checkpoint.
        name: one of :func:`aside_checkpoints`.

    Raises:
        CommandRejectedError: there is no such checkpoint.
        SessionError: the session belongs to another user, or the files cannot be removed.
    """
    session.check_owner()
    found = aside_checkpoints(session.checkpoints)
    if name not in found:
        there = ", ".join(found) or "none"
        raise CommandRejectedError(f"there is no checkpoint {name} (there are: {there})")
    try:
        remove(found[name])
    except OSError as error:
        raise SessionError(f"cannot remove the checkpoint {name}: {error}") from error


def _record(session: SessionFolder, command_id: str, step: int, who: str) -> None:
    with closing(JournalWriter(session)) as journal:
        record_deletion(journal, command_id, step, who)


def record_deletion(journal: JournalWriter, command_id: str, step: int, who: str) -> None:
    """Records a deletion as a command that has been applied. Raises sqlite3.Error."""
    journal.commands.record(command_id, DeleteCheckpoint.name(), {"step": step}, who)
    journal.delete_checkpoint(step, command_id)
