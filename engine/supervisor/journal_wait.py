"""Waits while the journal cannot be written, and shows it to the operators."""

import asyncio
import errno
import logging
import sqlite3
import time

from engine.journal.database import has_no_room
from engine.journal.writer import JournalWriter, is_busy
from engine.protocol.rank_messages import ROOM, WAIT_FOR, Phase
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.state import SupervisorState

log = logging.getLogger("engine")

RETRY_INTERVAL = 2.0
"""Seconds between attempts to write a journal that cannot be written."""
STOP_TIMEOUT = 30.0
"""Seconds that a run that is being stopped waits for a locked journal or for files to close."""
NO_FILES = (errno.EMFILE, errno.ENFILE)
"""Errors of a process, or a machine, that cannot open another file."""
CLOSED_FILES = "open files to be closed"
UNLOCKED_JOURNAL = "another program to unlock the journal"
"""A viewer that was stopped while it read, for one: on a network file system readers lock it."""


class JournalWait:
    """A wait until the journal can be written; it begins with the first error."""

    def __init__(
        self,
        rank: int,
        state: SupervisorState,
        journal: JournalWriter,
        publisher: EventPublisher,
    ) -> None:
        """Stores the rank whose phase shows the wait, and parts of the supervisor."""
        self._rank = rank
        self._state = state
        self._journal = journal
        self._publisher = publisher
        self._since = time.monotonic()
        self._before = state.phases.get(rank)
        """The phase to show again afterwards."""
        self._waits_for: str | None = None

    def check_unlocked(self) -> None:
        """Raises sqlite3.OperationalError if the wait is for a lock that is still held.

        A write would stop the event loop until it gives up.
        """
        if self._waits_for == UNLOCKED_JOURNAL:
            self._journal.check_unlocked()

    async def after(self, error: sqlite3.OperationalError | OSError) -> bool:
        """Waits a moment after a failed attempt to write; returns whether to try again.

        False if the error will not pass by itself. A run that is being stopped does not wait for
        room, and only briefly for anything else.
        """
        reason = _awaited(error)
        late = reason == ROOM or time.monotonic() - self._since > STOP_TIMEOUT
        if reason is None or (self._state.stopping and late):
            return False
        if self._waits_for is None:
            text = f"cannot write the journal: {error}; waiting for {reason}"
            log.error(text)
            self._publisher.notify_unrecorded("disk" if reason == ROOM else "journal", text)
        self._waits_for = reason
        self._show(Phase(rank=self._rank, step=self._journal.step, name=f"{WAIT_FOR}{reason}"))
        await asyncio.sleep(RETRY_INTERVAL)
        return True

    def end(self) -> None:
        """Shows the phase from before the wait again, unless the rank has reported another one.

        A rank of a paused run that has finished its save reports no phase until it is unpaused.
        """
        if self._waits_for is None:
            return
        log.warning("the journal can be written again; the run continues")
        now = self._state.phases.get(self._rank)
        if now is None or now.waits_for != self._waits_for:
            return
        if self._before is None:
            del self._state.phases[self._rank]
        else:
            self._show(self._before)

    def _show(self, phase: Phase) -> None:
        self._state.phases[self._rank] = phase
        self._publisher.phase(phase)


def _awaited(error: sqlite3.OperationalError | OSError) -> str | None:
    """What the run must wait for to write the journal; None if the error ends the run."""
    if isinstance(error, OSError):
        return CLOSED_FILES if error.errno in NO_FILES else None
    if has_no_room(error):
        return ROOM
    return UNLOCKED_JOURNAL if is_busy(error) else None
