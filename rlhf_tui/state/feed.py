"""Follows a session: reads its journal in a thread and posts updates.

Messages of the engine wake the reader; without an engine it reads once a second. All data except
phases and telemetry comes from the journal, so a lost connection loses nothing.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from engine.agreement import Agreement
from engine.errors import JournalError, RlhfError
from engine.journal.judgements.agreement import read_agreement
from engine.journal.reader import JournalReader
from engine.journal.rows import CheckpointRow, CommandRow
from engine.protocol.client import Client
from engine.protocol.client_messages import JournalAdvanced, Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.folder import Session
from rlhf_tui.state.first_read import SPANS, read_summary
from rlhf_tui.state.updates import SessionSummary, SessionUpdate, thinned

SHORTEST = 0.3
"""Least seconds between two readings: about three frames a second at most."""
IDLE = 1.0
"""Seconds after which it reads again without a message."""
RECONNECT = 0.5
EVENTS_READ = 20_000
"""Newest events read at once, which takes a tenth of a second; see :func:`thinned`."""
LONG = 10_000
"""Steps from which on outlines are read before the curves, which take longer."""
SAMPLES_SHOWN = 16

Post = Callable[[SessionUpdate], object]
"""Takes an update, from another thread."""


class SessionFeed(Protocol):
    """What posts the updates of a session: a :class:`Feed`, or the feed of a replay."""

    def start(self) -> None:
        """Starts to read, in threads."""

    def read_all(self) -> None:
        """Reads everything once, in the calling thread."""

    def stop(self) -> None:
        """Posts no more updates."""

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on."""


class JournalChanges:
    """Posts what is new in a journal since it was read last."""

    def __init__(self, names: Iterable[str], post: Post, is_stopped: Callable[[], bool]) -> None:
        """Nothing is read yet.

        Args:
            names: metrics to read; :meth:`want` adds to them.
            post: takes each update.
            is_stopped: whether to end early; a long run takes seconds.
        """
        self._wanted = list(dict.fromkeys(names))
        self._post = post
        self._is_stopped = is_stopped
        self._lock = threading.Lock()
        self.reset()

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on. Any thread may call it."""
        with self._lock:
            self._wanted += [n for n in names if n not in self._wanted]

    def reset(self) -> None:
        """Forgets what was read: another journal is read from now on."""
        self.head: SessionSummary | None = None
        """The summary that was posted last; None before the first."""
        self._attempts = 0
        self._event = 0
        self._at: dict[str, int] = {}
        self._past: set[str] = set()
        self._names: list[str] = []
        self._commands: list[CommandRow] = []
        self._checkpoints: list[CheckpointRow] = []
        self._samples_step = -1
        self._labels: tuple[int, ...] = ()

    def read(
        self, session: Session, record: JournalReader, labels: tuple[int, ...], live: SessionUpdate
    ) -> None:
        """Posts what is new; the first time in parts, so that the screen fills early.

        Args:
            session: whose journal.
            record: reads it.
            labels: changes whenever somebody labels a response.
            live: what has changed that is not in the journal; posted with the first part.
        """
        first = self.head is None
        head = read_summary(session, record)
        reset = self.head is not None and (
            len(head.attempts) != self._attempts or head.step < self.head.step
        )
        if reset:
            self.reset()
        self._attempts = len(head.attempts)
        advanced = self.head is None or head.step != self.head.step
        changed = head != self.head
        self.head = head
        update = msgspec.structs.replace(live, reset=reset, head=head if changed else None)
        # Clients write this file, so the engine sends no message.
        if labels != self._labels:
            self._labels = labels
            agreement = _agreement(record)
            update = msgspec.structs.replace(update, labels=labels, agreement=agreement)
        events = record.events(last=EVENTS_READ, after=self._event)
        if events:
            self._event = events[-1].event
            update = msgspec.structs.replace(update, events=thinned(events))
        if events or advanced or any(c.ended is None for c in self._commands):
            update = self._with_lists(update, record)
        self._send(update)
        branch = session.position is not None and session.position.current
        if (first or reset) and head.step > LONG and not branch:  # there they take longer
            self._send(SessionUpdate(outlines=record.outlines(self._wanted, SPANS)))
        self._read_curves(record, at_once=not (first or reset))
        if advanced and head.step != self._samples_step:
            self._samples_step = head.step
            self._send(SessionUpdate(samples=record.samples.newest(SAMPLES_SHOWN)))

    def _send(self, update: SessionUpdate) -> None:
        if update:
            self._post(update)

    def _with_lists(self, update: SessionUpdate, record: JournalReader) -> SessionUpdate:
        commands, checkpoints = record.commands(), record.checkpoints()
        if commands != self._commands:
            self._commands = commands
            update = msgspec.structs.replace(update, commands=commands)
        if checkpoints != self._checkpoints:
            self._checkpoints = checkpoints
            update = msgspec.structs.replace(update, checkpoints=checkpoints)
        names = record.metric_names()
        if names != self._names:
            self._names = names
            update = msgspec.structs.replace(update, names=names)
        return update

    def _read_curves(self, record: JournalReader, *, at_once: bool) -> None:
        with self._lock:
            wanted = list(self._wanted)
        curves: dict[str, list[tuple[int, float | None]]] = {}
        past: dict[str, list[tuple[int, int, float | None]]] = {}
        for name in wanted:
            if self._is_stopped():
                return
            points = record.series(name, after=self._at.get(name, -1))
            if points:
                self._at[name] = points[-1][0]
                curves[name] = points
            if self._attempts > 1 and name not in self._past:
                self._past.add(name)
                if rows := record.past_series(name):
                    past[name] = rows
            if not at_once:
                self._send(SessionUpdate(curves=curves, past=past))
                curves, past = {}, {}
        self._send(SessionUpdate(curves=curves, past=past))


class Feed:
    """Posts the updates of one session, from :meth:`start` to :meth:`stop`."""

    def __init__(self, session: Session, who: str, names: Iterable[str], post: Post) -> None:
        """Starts nothing yet.

        Args:
            session: whose journal.
            who: the name of this client in the engine.
            names: metrics to read; :meth:`want` adds to them.
            post: takes each update, from another thread.
        """
        self._session = session
        self._who = who
        self._post = post
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._changes = JournalChanges(names, self._send, self._stopped.is_set)
        self._phases: dict[int, Phase] = {}
        self._telemetry: Telemetry | None = None
        self._connected = False
        self._live_changed = False
        self._problem = ""
        self._record: JournalReader | None = None
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
        self._wake.set()

    # -- reading ------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            self._read_once()
            self._wake.wait(IDLE)
            self._wake.clear()
            self._stopped.wait(max(0.0, SHORTEST - (time.monotonic() - began)))

    def _read_once(self) -> None:
        try:
            self._open()
            if self._record is not None:
                labels = stamp(self._session.labels_file)
                self._changes.read(self._session, self._record, labels, self._live_state())
        except (RlhfError, OSError) as error:
            self._report(str(error))
            self._close()
        else:
            self._report("")

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._send(SessionUpdate(problem=problem))

    def _send(self, update: SessionUpdate) -> None:
        if not self._stopped.is_set():
            self._post(update)

    def _open(self) -> None:
        """Opens the journal, which may be new, replaced or deleted."""
        found = file_id(self._session.journal_file)
        if found == self._file and self._record is not None:
            return
        replaced = self._file is not None
        self._close()
        if found is None:
            if not self._session.folder.is_dir():
                raise FileNotFoundError(
                    f"the session's folder is gone: {self._session.folder}; "
                    "see what is left with: rlhf-tui ls"
                )
            if replaced:
                raise FileNotFoundError(f"the journal is gone: {self._session.journal_file}")
            self._send_head_of_new()
            return
        self._record = JournalReader(self._session)
        self._file = found
        if replaced:
            self._send(SessionUpdate(reset=True))

    def _send_head_of_new(self) -> None:
        """Posts the summary of a session whose engine has not written yet."""
        if self._changes.head is None:
            self._changes.head = SessionSummary("starting", 0, 0, {}, "", [], None, None)
            self._send(SessionUpdate(head=self._changes.head))

    def _close(self) -> None:
        if self._record is not None:
            self._record.close()
        self._record = None
        self._changes.reset()

    # -- messages of the engine ----------------------------------------------------------------

    def _watch_loop(self) -> None:
        while not self._stopped.is_set():
            try:
                with Client(self._session, self._who) as client:
                    status = client.status()
                    self._take_messages(*status.phases, status.telemetry)
                    self._set_connected(True)
                    for message in client.watch():
                        if self._stopped.is_set():
                            return
                        self._take_messages(message)
            except (RlhfError, OSError):
                pass  # no engine runs; the journal has the state of the session
            self._set_connected(False)
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
        self._wake.set()

    def _set_connected(self, connected: bool) -> None:
        with self._lock:
            if self._connected != connected:
                self._connected = connected
                self._live_changed = True
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
            )


def _agreement(record: JournalReader) -> Agreement:
    """That with the judgements. A damaged labels.db does not hide the rest of the session."""
    try:
        return read_agreement(record)
    except JournalError as error:
        return Agreement(problem=str(error))


def stamp(path: Path) -> tuple[int, ...]:
    """Returns a value that changes whenever the file changes; () without a file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called every second
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def file_id(path: Path) -> tuple[int, int] | None:
    """Returns device and inode of the file at a path; None without a file."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
