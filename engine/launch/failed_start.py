"""Sessions in which nothing was trained: new ones, and those whose start failed."""

import contextlib
from pathlib import Path

from engine.errors import SessionError
from engine.journal.judgements.labels import LabelReader
from engine.journal.reader import JournalReader
from engine.journal.rows import ForkOrigin
from engine.launch.start_options import StartOptions
from engine.session.checkpoints import COMPLETE, checkpoint_path
from engine.session.folder import SessionFolder


def is_new(session: SessionFolder, start: StartOptions) -> bool:
    """Whether the session was created for this start, and holds nothing but its configuration.

    Such a session is removed when the start fails because of the user's input. One whose journal
    is lost but which has checkpoints, samples or judgements is not new.
    """
    databases = (session.journal_file, session.samples_file, session.labels_file)
    return bool(start.origin) or not (
        any(file.exists() for file in databases) or any(session.checkpoints.glob("*step-*"))
    )


def remove_new(session: SessionFolder) -> None:
    """Removes a new session whose start failed.

    It stays if another engine has it, or if something in it was judged meanwhile.
    """
    try:
        held = session.acquire()
    except SessionError:
        return
    try:
        if not session.labels_file.exists():
            with contextlib.suppress(OSError):
                session.delete(held)
    finally:
        held.release()


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
        sums = {(folder / COMPLETE).read_bytes() for folder in folders}
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
