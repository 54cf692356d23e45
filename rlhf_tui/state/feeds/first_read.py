"""Reads a session's summary in a thread while the app is still being imported.

SQLite releases the GIL, so on two processors the downsampled curves cost no time: they are
read before the first frame is drawn.
"""

import threading
from collections.abc import Iterable

from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate

SPANS = 500
"""Spans of a downsampled curve: more than the dot columns of a chart on half of a wide terminal."""
FIRST_FRAME_TIMEOUT = 0.1
"""Seconds that the first frame waits for a slow disk."""


def read_summary(session: SessionFolder, reader: JournalReader) -> SessionSummary:
    """Returns the summary of a session. Raises JournalError."""
    meta, attempts = reader.meta(), reader.attempts()
    if (position := session.position) is None:
        live = session.is_live()
        engine = session.engine() if live else None
        pid, host = (engine.pid, engine.host) if engine else (None, None)
    else:
        live = position.live
        pid, host = (attempts[-1].pid, attempts[-1].host) if live and attempts else (None, None)
    return SessionSummary(
        state=meta.state if live else reader.state(),
        step=reader.last_step(),
        total_steps=meta.total_steps,
        settings=meta.settings or {},
        message=meta.message,
        attempts=attempts,
        pid=pid,
        host=host,
        pause_reason=meta.pause_reason,
        deadline=meta.deadline,
    )


class FirstRead:
    """Starts to read at construction. Ignores errors; the feed reports them."""

    def __init__(self, session: SessionFolder, names: Iterable[str]) -> None:
        """Starts to read; `names`: metrics whose downsampled curves are read."""
        self.session = session
        self._names = list(names)
        self._update = SessionUpdate()
        self._thread = threading.Thread(target=self._read, daemon=True, name="first-read")
        self._thread.start()

    def _read(self) -> None:
        try:
            with JournalReader(self.session) as reader:
                if reader.attempts():
                    head = read_summary(self.session, reader)
                    self._update = SessionUpdate(
                        head=head, downsampled=reader.metrics.downsampled(self._names, SPANS)
                    )
        except (RlhfError, OSError):
            return

    def update(self) -> SessionUpdate:
        """Returns what was read; empty if there was nothing, or it was not read in time."""
        self._thread.join(FIRST_FRAME_TIMEOUT)
        return self._update
