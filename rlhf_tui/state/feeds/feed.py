"""Follows a session: reads its journal in a thread and posts updates.

Messages of the engine wake the reader. It reads the journal when one says that there are new rows,
and once a second besides. All data except phases and telemetry comes from the journal, so a lost
connection loses nothing.
"""

import threading
import time
from collections.abc import Iterable
from typing import Protocol

from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.session.file_signature import file_id, file_signature
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.engine_watch import EngineWatch
from rlhf_tui.state.feeds.journal_changes import JournalChanges
from rlhf_tui.state.feeds.output import Post, UpdateOutput
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate

MIN_INTERVAL = 0.3
"""Minimum seconds between two readings: about three frames a second."""
IDLE_INTERVAL = 1.0
"""Seconds after which it reads again without new rows: labels have no message."""
START_TIMEOUT = 30.0
"""Seconds after the start of a run during which its engine may not be up yet."""


class SessionFeed(Protocol):
    """Posts the updates of a session: a :class:`Feed`, or the feed of a replay."""

    def start(self) -> None:
        """Starts to read, in threads."""

    def read_all(self) -> None:
        """Reads everything once, in the calling thread."""

    def stop(self) -> None:
        """Posts no more updates."""

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on."""


class Feed:
    """Posts the updates of one session, from :meth:`start` to :meth:`stop`."""

    def __init__(self, session: SessionFolder, who: str, names: Iterable[str], post: Post) -> None:
        """Starts nothing yet.

        Args:
            session: the session to follow.
            who: the name of this client in the engine.
            names: metrics to read; :meth:`want` adds to them.
            post: called with each update, from another thread.
        """
        self._session = session
        self._output = UpdateOutput(post)
        self._stopped = self._output.stopped
        self._changes = JournalChanges(names, self._output)
        self._engine = EngineWatch(
            session, who, stopped=self._stopped, on_message=self._on_engine_message
        )
        self._wake = threading.Event()
        self._unread = threading.Event()
        """Whether something was announced since the last reading."""
        self._unread.set()
        self._reader: JournalReader | None = None
        self._file: tuple[int, int] | None = None

    def start(self) -> None:
        """Starts the threads. They are daemons: they end with the process."""
        threading.Thread(target=self._read_loop, daemon=True, name="read-journal").start()
        self._engine.start()

    def read_all(self) -> None:
        """Reads everything once, in the calling thread."""
        self._read_once()

    def stop(self) -> None:
        """Posts no more updates."""
        self._stopped.set()
        self._wake.set()

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on."""
        self._changes.want(names)
        self._read_soon()

    def repeat_summary(self, readings: int) -> None:
        """Posts the summary of the next readings even if it is the same; reads soon."""
        self._changes.repeat_summary(readings)
        self._read_soon()

    def _read_soon(self) -> None:
        self._unread.set()
        self._wake.set()

    def _on_engine_message(self, journal_advanced: bool) -> None:
        if journal_advanced:
            self._unread.set()
        self._wake.set()

    # -- reading ------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        read = -IDLE_INTERVAL
        while not self._stopped.is_set():
            began = time.monotonic()
            if self._unread.is_set() or began >= read + IDLE_INTERVAL:
                self._unread.clear()
                self._read_once()
                read = began
            elif self._reader is not None:
                self._output.post(self._engine.update())
            self._wake.wait(IDLE_INTERVAL)
            self._wake.clear()
            self._stopped.wait(max(0.0, MIN_INTERVAL - (time.monotonic() - began)))

    def _read_once(self) -> None:
        try:
            self._open()
            if self._reader is not None:
                labels = file_signature(self._session.labels_file)
                self._changes.read(self._session, self._reader, labels, self._engine.update())
        except (RlhfError, OSError) as error:
            self._output.report(str(error))
            self._close()
        else:
            self._output.report("")

    def _open(self) -> None:
        """Opens the journal, which may be new, replaced or deleted."""
        found = file_id(self._session.journal_file)
        if found == self._file and self._reader is not None:
            return
        replaced = self._file is not None
        self._close()
        if found is None:
            if not self._session.folder.is_dir():
                raise FileNotFoundError(
                    "the session's folder was moved or deleted; 1 Sessions lists what is left: "
                    f"{self._session.folder}"
                )
            if replaced:
                raise FileNotFoundError(f"the journal is gone: {self._session.journal_file}")
            self._send_head_of_new()
            return
        self._reader = JournalReader(self._session)
        self._file = found
        if replaced:
            self._output.post(SessionUpdate(reset=True))

    def _send_head_of_new(self) -> None:
        """Posts the summary of a session whose engine has written nothing yet, or never will."""
        written = self._session.config_file.stat().st_mtime
        # The clock may have been set back since, or be that of another machine.
        starting = self._session.is_live() or abs(time.time() - written) < START_TIMEOUT
        state = "starting" if starting else "crashed"
        head = SessionSummary(state, 0, 0, {}, "", [], None, None)
        self._output.post(SessionUpdate(head=head))

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._changes.reset()
