"""Sessions in which nothing was trained: new ones, and those whose start failed."""

import contextlib
from pathlib import Path

from engine.errors import JournalError, SessionError, UserInputError
from engine.journal.judgements.labels import LabelReader
from engine.journal.reader import JournalReader
from engine.journal.rows import ForkOrigin
from engine.launch.start_options import StartOptions
from engine.session.access import read_bytes
from engine.session.checkpoints import COMPLETE, checkpoint_path
from engine.session.folder import SessionFolder

INTERRUPTED_EXIT = 130
"""The exit code of a start that was interrupted: 128 and the number of SIGINT."""


class NewSession:
    """A session at a start; removed again if it was created for this start and is not used."""

    def __init__(self, session: SessionFolder, start: StartOptions) -> None:
        """Call this before the engine starts."""
        self._session = session
        self._is_new = _is_new(session, start)
        self._attempt = _last_attempt(session)

    def remove_if_unused(self, code: int | None) -> bool:
        """Removes a new session if the user's input was wrong, or the start was interrupted early.

        Early is before its first attempt. It stays if another engine has it, or if something in it
        was judged meanwhile. If its engine ran and failed, it stays with its log, and the next run
        may take its name.

        Args:
            code: the exit code of the engine; None if it has not ended.

        Returns:
            Whether it was removed.
        """
        session, attempt = self._session, self._attempt
        unused = code == UserInputError.exit_code or (
            code == INTERRUPTED_EXIT and attempt is not None and _last_attempt(session) == attempt
        )
        if not (self._is_new and unused):
            return False
        try:
            held = session.acquire()
        except SessionError:  # another engine has it
            return False
        try:
            if session.labels_file.exists():
                return False
            with contextlib.suppress(OSError):
                session.delete(held)
            return True
        finally:
            held.release()


def _is_new(session: SessionFolder, start: StartOptions) -> bool:
    """One whose journal is lost but which has checkpoints, samples or judgements is not new."""
    databases = (session.journal_file, session.samples_file, session.labels_file)
    return bool(start.origin) or not (
        any(file.exists() for file in databases) or any(session.checkpoints.glob("*step-*"))
    )


def _last_attempt(session: SessionFolder) -> int | None:
    """The number of the last attempt, 0 before the first; None if the journal cannot be read."""
    try:
        with JournalReader(session) as reader:
            return max((attempt.attempt for attempt in reader.attempts()), default=0)
    except JournalError:
        return None


def is_failed_start(session: SessionFolder) -> bool:
    """Whether a session has ended without a step, a checkpoint or a judgement of its own.

    Such a session does not block its name, unless an operator has left a note in it or changed a
    setting. What a fork has copied does not count while the session it was forked from has it.
    """
    if session.is_live():
        return False
    with JournalReader(session) as reader:
        ended = reader.state() in ("failed", "crashed", "stopped")
        return ended and _has_nothing(session, reader)


def _has_nothing(session: SessionFolder, reader: JournalReader) -> bool:
    """Whether a session was started and nothing of its own would be lost with it."""
    attempts, origin = reader.attempts(), reader.fork_origin()
    first = origin.attempt if origin is not None else 1
    if not attempts or attempts[-1].attempt < first or reader.has_steps(first):
        return False
    if any(e.kind == "note" and e.attempt >= first for e in reader.events()):
        return False
    if any(c.status == "applied" and c.changes and c.attempt >= first for c in reader.commands()):
        return False
    with LabelReader(session) as labels:
        if labels.count():
            return False
    copied = set() if origin is None else _copied(session, origin)
    return set(session.checkpoints.glob("step-*")) <= copied


def _copied(session: SessionFolder, origin: ForkOrigin) -> set[Path]:
    """The checkpoint that a fork shares with its source; none if only the fork has it now."""
    source = SessionFolder(session.folder.parent / origin.session)
    folders = [checkpoint_path(s.checkpoints, origin.step) for s in (session, source)]
    try:
        sums = {read_bytes(folder / COMPLETE) for folder in folders}
    except OSError:
        return set()
    return set() if len(sums) > 1 else {folders[0]}


def remove_failed_start(session: SessionFolder) -> None:
    """Removes a session if its start failed, so that another one can have its name.

    Raises:
        SessionLockedError: an engine has started it meanwhile, or serves it on another machine.
        SessionError: the session belongs to another user.
    """
    if not session.folder.exists():
        return
    session.wait_for_killed_engine()
    if not is_failed_start(session):
        return
    held = session.acquire()
    try:
        session.check_other_machine()
        # Another start may have replaced or resumed it meanwhile. Nobody runs it now.
        with JournalReader(session) as reader:
            failed = reader.meta().state != "finished" and _has_nothing(session, reader)
        if failed:
            with contextlib.suppress(OSError):
                session.delete(held)
    finally:
        held.release()
