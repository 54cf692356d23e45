"""What the engine of a session sends: the phases of its ranks, and readings of its machine."""

import threading
from collections.abc import Callable

from engine.errors import RefusedByEngineError, RlhfError
from engine.protocol.client import Client
from engine.protocol.client_messages import JournalAdvanced, Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.updates import SessionUpdate

RECONNECT_INTERVAL = 0.5
"""Seconds between two attempts to connect."""


class EngineWatch:
    """Watches the engine in a thread, from :meth:`start` until `stopped` is set."""

    def __init__(
        self,
        session: SessionFolder,
        who: str,
        *,
        stopped: threading.Event,
        on_message: Callable[[bool], object],
    ) -> None:
        """Starts nothing yet.

        Args:
            session: whose engine to watch.
            who: the name of this client in the engine.
            stopped: ends the thread.
            on_message: called in the thread when something has arrived, with whether the journal
                has new rows.
        """
        self._session = session
        self._who = who
        self._stopped = stopped
        self._on_message = on_message
        self._lock = threading.Lock()
        self._phases: dict[int, Phase] = {}
        self._telemetry: Telemetry | None = None
        self._connected = False
        self._refused = ""
        self._changed = False

    def start(self) -> None:
        """Starts the thread. It is a daemon: it ends with the process."""
        threading.Thread(target=self._loop, daemon=True, name="watch-engine").start()

    def update(self) -> SessionUpdate:
        """What has changed since the last call; empty if nothing has."""
        with self._lock:
            if not self._changed:
                return SessionUpdate()
            self._changed = False
            return SessionUpdate(
                phases=sorted(self._phases.values(), key=lambda p: p.rank),
                telemetry=self._telemetry,
                connected=self._connected,
                refused=self._refused,
            )

    def _loop(self) -> None:
        while not self._stopped.is_set():
            refused = ""
            try:
                with Client(self._session, self._who) as client:
                    status, messages = client.status(), client.watch()
                    first = next(messages, None)
                    if first is not None:
                        self._take(*status.phases, status.telemetry, first)
                        self._set_connected(True)
                    for message in messages:
                        if self._stopped.is_set():
                            return
                        self._take(message)
            except RefusedByEngineError as error:
                refused = str(error)
            except (RlhfError, OSError):
                pass  # no engine runs; the journal has the state
            self._set_connected(False, refused)
            self._stopped.wait(RECONNECT_INTERVAL)

    def _take(self, *messages: JournalAdvanced | Phase | Telemetry | None) -> None:
        rows = False
        with self._lock:
            for message in messages:
                match message:
                    case Phase():
                        self._phases[message.rank] = message
                        self._changed = True
                    case Telemetry():
                        self._telemetry = message
                        self._changed = True
                    case JournalAdvanced():
                        rows = True
        self._on_message(rows)

    def _set_connected(self, connected: bool, refused: str = "") -> None:
        with self._lock:
            changed = (self._connected, self._refused) != (connected, refused)
            if changed:
                self._connected, self._refused = connected, refused
                self._changed = True
                if not connected:
                    self._phases.clear()
                    self._telemetry = None
        self._on_message(changed)
