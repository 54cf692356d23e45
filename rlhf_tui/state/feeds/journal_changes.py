"""Finds what is new in a journal since it was last read."""

import threading
from collections.abc import Iterable

import msgspec

from engine.agreement import Agreement
from engine.errors import JournalError
from engine.journal.judgements.agreement import read_agreement
from engine.journal.reader import JournalReader
from engine.journal.rows import CheckpointRow, CommandRow
from engine.session.file_signature import FileSignature
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.first_read import SPANS, read_summary
from rlhf_tui.state.feeds.output import UpdateOutput
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate, newest_events

EVENTS_READ = 20_000
"""Newest events read at once, which takes a tenth of a second; see :func:`newest_events`."""
LONG_RUN_STEPS = 10_000
"""Number of steps above which downsampled curves are read before the slower whole ones."""
SAMPLES_SHOWN = 16


class JournalChanges:
    """Posts what is new in a journal since it was last read."""

    def __init__(self, names: Iterable[str], output: UpdateOutput) -> None:
        """Nothing is read yet.

        Args:
            names: metrics to read; :meth:`want` adds to them.
            output: posts each update. When it is stopped, a reading ends early: for a long run it
                takes seconds.
        """
        self._wanted = list(dict.fromkeys(names))
        self._output = output
        self._lock = threading.Lock()
        self._repeats = 0
        """Readings whose summary is posted even if it has not changed."""
        self.reset()

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on. Any thread may call it."""
        with self._lock:
            self._wanted += [n for n in names if n not in self._wanted]

    def repeat_summary(self, readings: int) -> None:
        """Posts the summary of the next readings even if it is the same. Any thread may call it."""
        with self._lock:
            self._repeats = readings

    def _take_repeat(self) -> bool:
        with self._lock:
            repeats, self._repeats = self._repeats, max(0, self._repeats - 1)
            return repeats > 0

    def reset(self) -> None:
        """Forgets what was read: another journal is read from now on."""
        self.head: SessionSummary | None = None
        """The summary that was posted last; None before the first."""
        self._attempts = 0
        self._event = 0
        self._at: dict[str, int] = {}
        self._past: set[str] = set()
        self._names: list[str] = []
        self._commands: dict[int, CommandRow] = {}
        """The commands by number, see :meth:`JournalReader.numbered_commands`."""
        self._ended = 0
        """The commands up to this number have ended; later ones are read again."""
        self._checkpoints: list[CheckpointRow] = []
        self._samples_step = -1
        self._labels: FileSignature = ()

    def read(
        self,
        session: SessionFolder,
        reader: JournalReader,
        labels: FileSignature,
        live: SessionUpdate,
    ) -> None:
        """Posts what is new; the first time in parts, so that the screen fills early.

        Args:
            session: the session.
            reader: the reader of its journal.
            labels: changes whenever somebody labels a response.
            live: changes that are not in the journal; posted with the first part.
        """
        first = self.head is None
        head = read_summary(session, reader)
        reset = self.head is not None and (
            len(head.attempts) != self._attempts or head.step < self.head.step
        )
        if reset:
            self.reset()
        self._attempts = len(head.attempts)
        advanced = self.head is None or head.step != self.head.step
        changed = self._take_repeat() or head != self.head
        self.head = head
        update = msgspec.structs.replace(live, reset=reset, head=head if changed else None)
        # Clients write this file, so the engine sends no message.
        if labels != self._labels:
            self._labels = labels
            agreement = _agreement(reader)
            update = msgspec.structs.replace(update, labels=labels, agreement=agreement)
        events = reader.events(last=EVENTS_READ, after=self._event)
        if events:
            self._event = events[-1].event
            update = msgspec.structs.replace(update, events=newest_events(events))
        # Every new command and checkpoint has an event, so that a step alone changes neither.
        replayed = advanced and session.position is not None
        if events or replayed or self._ended < max(self._commands, default=0):
            update = self._with_lists(update, session, reader)
        if advanced or events:
            update = self._with_names(update, reader)
        self._output.post(update)
        branch = session.position is not None and session.position.current
        if (first or reset) and head.step > LONG_RUN_STEPS and not branch:  # there they take longer
            downsampled = reader.metrics.downsampled(self._wanted, SPANS)
            self._output.post(SessionUpdate(downsampled=downsampled))
        self._read_curves(reader, at_once=not (first or reset))
        if advanced and head.step != self._samples_step:
            self._samples_step = head.step
            self._output.post(SessionUpdate(samples=reader.samples.newest(SAMPLES_SHOWN)))

    def _with_lists(
        self, update: SessionUpdate, session: SessionFolder, reader: JournalReader
    ) -> SessionUpdate:
        commands, checkpoints = self._read_commands(session, reader), reader.checkpoints()
        if commands != self._commands:
            self._commands = commands
            update = msgspec.structs.replace(update, commands=list(commands.values()))
        if checkpoints != self._checkpoints:
            self._checkpoints = checkpoints
            update = msgspec.structs.replace(update, checkpoints=checkpoints)
        return update

    def _read_commands(
        self, session: SessionFolder, reader: JournalReader
    ) -> dict[int, CommandRow]:
        """All commands; ended ones are read again only if other commands may have changed them.

        A command of this attempt overrides later ones of an earlier attempt. In a history, the
        clock, which may have been set back, decides what had been sent by then; so all are read if
        one is missing.
        """
        known = {n: c for n, c in self._commands.items() if n <= self._ended}
        new = reader.numbered_commands(max(known, default=0))
        first = min((c.applied_step for c in new.values() if c.applied_step), default=None)
        overrides = first is not None and any((c.applied_step or 0) > first for c in known.values())
        read = len(known) + len(new)
        if overrides or (session.position is not None and read != reader.command_count()):
            known, new = {}, reader.numbered_commands()
        commands = known | new
        unfinished = [number for number, command in commands.items() if command.ended is None]
        self._ended = min(unfinished) - 1 if unfinished else max(commands, default=0)
        return commands

    def _with_names(self, update: SessionUpdate, reader: JournalReader) -> SessionUpdate:
        names = reader.metrics.names()
        if names != self._names:
            self._names = names
            update = msgspec.structs.replace(update, names=names)
        return update

    def _read_curves(self, reader: JournalReader, *, at_once: bool) -> None:
        with self._lock:
            wanted = list(self._wanted)
        curves: dict[str, list[tuple[int, float | None]]] = {}
        past: dict[str, list[tuple[int, int, float | None]]] = {}
        for name in wanted:
            if self._output.stopped.is_set():
                return
            points = reader.metrics.series(name, after=self._at.get(name, -1))
            if points:
                self._at[name] = points[-1][0]
                curves[name] = points
            if self._attempts > 1 and name not in self._past:
                self._past.add(name)
                if rows := reader.metrics.past_series(name):
                    past[name] = rows
            if not at_once:
                self._output.post(SessionUpdate(curves=curves, past=past))
                curves, past = {}, {}
        self._output.post(SessionUpdate(curves=curves, past=past))


def _agreement(reader: JournalReader) -> Agreement:
    """Agreement with the judgements. A damaged labels.db does not hide the rest of a session."""
    try:
        return read_agreement(reader)
    except JournalError as error:
        return Agreement(problem=str(error))
