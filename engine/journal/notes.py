"""Adds a note to the journal of a session without an engine; a live engine does it itself."""

import sqlite3
from contextlib import closing

from engine.errors import JournalError
from engine.journal.database import write_problem
from engine.journal.writer import JournalWriter
from engine.protocol.commands import Note
from engine.session.folder import SessionFolder


def add_note(session: SessionFolder, text: str, who: str) -> int:
    """Adds a note, holding the session's lock.

    Returns:
        The last completed step, to which the note is attached.

    Raises:
        CommandRejectedError: the text is empty or too long.
        JournalError: the journal cannot be written.
        SessionLockedError: the session has a live engine.
        SessionError: the session belongs to another user.
    """
    Note(text=text).check_arguments()
    lock = session.acquire()  # only the holder of the lock may write the journal
    try:
        session.check_other_machine()
        with closing(JournalWriter(session)) as journal:
            journal.record_event("note", {"text": text, "who": who})
            step = journal.step
    except sqlite3.Error as error:
        raise JournalError(
            f"cannot write {session.journal_file}: {write_problem(error)}"
        ) from error
    finally:
        lock.release()
    return step
