"""Sessions in which nothing was trained: new ones, and those whose start failed."""

import contextlib

from engine.journal.reader import JournalReader
from engine.launch.start_options import StartOptions
from engine.session.checkpoints import checkpoint_path
from engine.session.folder import SessionFolder


def is_new(session: SessionFolder, start: StartOptions) -> bool:
    """Whether the session was created for this start, and holds nothing but its configuration.

    Such a session is removed when the start fails because of the user's input. One whose journal
    is lost but which has checkpoints is not new.
    """
    return bool(start.origin) or not (
        session.journal_file.exists() or any(session.checkpoints.glob("step-*"))
    )


def is_failed_start(session: SessionFolder) -> bool:
    """Whether a session has ended without a step or a checkpoint of its own.

    Such a session does not block its name: nothing was trained in it. The copied steps and
    checkpoint of a fork do not count, because the session it was forked from still has them.
    """
    if session.is_live():
        return False
    with JournalReader(session) as reader:
        ended = reader.state() in ("failed", "crashed", "stopped")
        return ended and _has_trained_nothing(session, reader)


def _has_trained_nothing(session: SessionFolder, reader: JournalReader) -> bool:
    """Whether a session has been started, and has neither a step nor a checkpoint of its own."""
    attempts, origin = reader.attempts(), reader.fork_origin()
    first = origin.attempt if origin is not None else 1
    if not attempts or attempts[-1].attempt < first or reader.has_steps(first):
        return False
    copied = {checkpoint_path(session.checkpoints, origin.step)} if origin is not None else set()
    return set(session.checkpoints.glob("step-*")) <= copied


def remove_failed_start(session: SessionFolder) -> None:
    """Removes a session if its start failed, so that another one can have its name.

    Raises:
        SessionError: the session belongs to another user.
    """
    if not session.folder.exists() or not is_failed_start(session):
        return
    held = session.acquire()
    try:
        # Another start may have replaced or resumed it meanwhile. Nobody runs it now.
        with JournalReader(session) as reader:
            failed = reader.meta().state != "finished" and _has_trained_nothing(session, reader)
        if failed:
            with contextlib.suppress(OSError):
                session.delete(held)
    finally:
        held.release()
