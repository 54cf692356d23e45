"""Follows a session: reads its journal in a thread and posts updates.

Messages of the engine wake the reader. It reads the journal when one says that there are new rows,
and once a second besides. All data except phases and telemetry comes from the journal, so a lost
connection loses nothing.
"""

import threading
import time
from collections.abc import Iterable
from typing import Protocol

from engine.errors import RefusedByEngineError, RlhfError
from engine.journal.reader import JournalReader
from engine.protocol.client import Client
from engine.protocol.client_messages import JournalAdvanced, Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.file_signature import file_id, file_signature
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.journal_changes import JournalChanges
from rlhf_tui.state.feeds.output import Post, UpdateOutput
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate

SHORTEST = 0.3
"""Minimum seconds between two readings: about three frames a second."""
IDLE = 1.0
"""Seconds after which it reads again without new rows: labels have no message."""
RECONNECT = 0.5
APPEARS = 30.0
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
        self._who = who
        self._output = UpdateOutput(post)
        self._stopped = self._output.stopped
        self._changes = JournalChanges(names, self._output)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._phases: dict[int, Phase] = {}
        self._telemetry: Telemetry | None = None
        self._connected = False
        self._refused = ""
        self._live_changed = False
        self._unread = True
        self._reader: JournalReader | None = None
        self._file: tuple[int, int] | None = None

    def start(self) -> None:
        """Starts the threads. They are daemons: they end with the process."""
        for target in (self._read_loop, self._watch_loop):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()

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
        with self._lock:
            self._unread = True
        self._wake.set()

    def repeat_summary(self, readings: int) -> None:
        """Posts the summary of the next readings even if it is the same; reads soon."""
        self._changes.repeat_summary(readings)
        with self._lock:
            self._unread = True
        self._wake.set()

    # -- reading ------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        read = -IDLE
        while not self._stopped.is_set():
            began = time.monotonic()
            if self._take_unread() or began >= read + IDLE:
                self._read_once()
                read = began
            elif self._reader is not None:
                self._output.post(self._live_state())
            self._wake.wait(IDLE)
            self._wake.clear()
            self._stopped.wait(max(0.0, SHORTEST - (time.monotonic() - began)))

    def _take_unread(self) -> bool:
        """Whether something was announced since the last call."""
        with self._lock:
            unread, self._unread = self._unread, False
            return unread

    def _read_once(self) -> None:
        try:
            self._open()
            if self._reader is not None:
                labels = file_signature(self._session.labels_file)
                self._changes.read(self._session, self._reader, labels, self._live_state())
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
        starting = self._session.is_live() or abs(time.time() - written) < APPEARS
        state = "starting" if starting else "crashed"
        head = SessionSummary(state, 0, 0, {}, "", [], None, None)
        self._output.post(SessionUpdate(head=head))

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._changes.reset()

    # -- messages of the engine ----------------------------------------------------------------

    def _watch_loop(self) -> None:
        while not self._stopped.is_set():
            refused = ""
            try:
                with Client(self._session, self._who) as client:
                    status, messages = client.status(), client.watch()
                    first = next(messages, None)
                    if first is not None:
                        self._take_messages(*status.phases, status.telemetry, first)
                        self._set_connected(True)
                    for message in messages:
                        if self._stopped.is_set():
                            return
                        self._take_messages(message)
            except RefusedByEngineError as error:
                refused = str(error)
            except (RlhfError, OSError):
                pass  # no engine runs; the journal has the state
            self._set_connected(False, refused)
            self._stopped.wait(RECONNECT)

    def _take_messages(self, *messages: JournalAdvanced | Phase | Telemetry | None) -> None:
        with self._lock:
            for message in messages:
                match message:
                    case Phase():
                        self._phases[message.rank] = message
                        self._live_changed = True
                    case Telemetry():
                        self._telemetry = message
                        self._live_changed = True
                    case JournalAdvanced():
                        self._unread = True
        self._wake.set()

    def _set_connected(self, connected: bool, refused: str = "") -> None:
        with self._lock:
            if (self._connected, self._refused) != (connected, refused):
                self._connected, self._refused = connected, refused
                self._live_changed = self._unread = True
                if not connected:
                    self._phases.clear()
                    self._telemetry = None
        self._wake.set()

    def _live_state(self) -> SessionUpdate:
        with self._lock:
            if not self._live_changed:
                return SessionUpdate()
            self._live_changed = False
            return SessionUpdate(
                phases=sorted(self._phases.values(), key=lambda p: p.rank),
                telemetry=self._telemetry,
                connected=self._connected,
                refused=self._refused,
            )
