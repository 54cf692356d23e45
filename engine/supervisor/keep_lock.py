"""Keeps other engines away from a session while one serves it, beside the lock itself."""

import asyncio
import logging
import os

from engine.errors import SessionError, SessionLockedError
from engine.journal.writer import JournalWriter
from engine.session.folder import SIGN_INTERVAL, SessionFolder
from engine.session.lock import SessionLock

log = logging.getLogger("engine")


async def keep_lock(session: SessionFolder, lock: SessionLock, journal: JournalWriter) -> None:
    """Shows that this engine lives, and takes the lock again if its file is deleted.

    If another engine has taken the session by then, this process ends at once, and its ranks with
    it: two engines would write the same files. Where the locks of other machines are not seen, that
    can be one that started while this process or its file system stood still.

    Call it once engine.json is written.
    """
    this = session.engine()
    while True:
        await asyncio.sleep(SIGN_INTERVAL)
        if not journal.is_in_place():  # what is at its path now may be another session
            continue
        engine = session.engine()
        if this and engine and engine != this:
            _end(f"another engine (pid {engine.pid} on {engine.host})")
        session.show_life()
        try:
            if lock.restore():
                log.warning("%s was deleted; it is locked again", session.lock_file)
        except SessionLockedError:
            _end(f"{session.lock_file} was deleted, and another engine")
        except (SessionError, OSError) as error:  # such as on a disk that is read-only for a moment
            log.debug("cannot look at %s: %s", session.lock_file, error)


def _end(other: str) -> None:
    log.error("%s has taken the session: this one ends at once", other)
    os._exit(1)
