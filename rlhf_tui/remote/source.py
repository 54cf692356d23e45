"""Reads the changes of a session, for a copy on another machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import SessionError
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.session.access import open_to_read
from engine.session.file_signature import FileSignature, file_signature
from engine.session.folder import SessionFolder
from rlhf_tui.remote.messages import VERSION, Done, EngineState, Hello, Log, Message, Rows

LOG_BYTES = 200_000
"""Bytes of the log that a copy begins with, and that are sent at once."""
SAMPLED_STEPS = 200
"""Number of newest steps whose responses a copy begins with."""
SMALL_TABLES = ("meta", "names", "attempts", "commands", "checkpoints")
"""Tables that are sent whole when they have changed."""
LABELS = ("judgements", "preferences")
SAMPLES = ("samples", "evaluated")


class SessionSource:
    """Reads a session for a copy: first its tail, then its changes."""

    def __init__(self, session: SessionFolder, tail: int) -> None:
        """Reads nothing yet.

        Args:
            session: the session to copy.
            tail: number of newest steps whose metrics the copy begins with.
        """
        self._session = session
        self._tail = tail
        self._signatures: object = None
        self._attempt = self._event = 0
        self._step = self._sampled = -1
        self._fresh = True
        """Whether the copy must begin anew: an attempt has replaced steps."""
        self._small: dict[str, list[Any]] = {}
        self._labels: FileSignature = ()
        self._log_at = -1

    def hello(self) -> Hello:
        """The first message. Raises SessionError."""
        try:
            config = self._session.config_file.read_text(encoding="utf-8")
        except OSError as error:
            text = f"cannot read {self._session.config_file}: {error.strerror}"
            raise SessionError(text) from error
        return Hello(VERSION, self._session.name, config)

    def changes(self) -> Iterator[Message]:
        """The changes since the last call; empty if there are none. Raises SessionError."""
        session = self._session
        engine = session.engine() if session.is_live() else None
        journal = session.journal_file
        files = (journal, journal.with_name("journal.db-wal"), session.labels_file)
        log_size = session.log_file.stat().st_size if session.log_file.exists() else 0
        signatures = (engine, log_size, *map(file_signature, files))
        if signatures == self._signatures:
            return
        self._signatures = signatures
        # Whole, so that no snapshot is open while a slow connection takes the messages: on network
        # file systems the writer of the journal would wait for it.
        yield from list(self._journal())
        yield from self._samples()
        yield from self._judgements()
        yield from self._log(session.log_file)
        yield EngineState(engine.socket, engine.pid) if engine is not None else EngineState(None)
        yield Done()

    def _journal(self) -> Iterator[Message]:
        database = ReadOnlyDatabase(self._session.journal_file, schema.JOURNAL)
        try:
            with database.snapshot():
                attempt = database.value("SELECT max(attempt) FROM attempts") or 0
                fresh = self._fresh = attempt != self._attempt
                # Step 0, the evaluation before training, has no row in `steps`.
                last = database.value("SELECT max(step) FROM steps")
                last = -1 if last is None else last
                if fresh:
                    self._attempt, self._step = attempt, max(last - self._tail, -1)
                    self._sampled = max(last - SAMPLED_STEPS, -1)
                    for table in ("steps_past", "metrics_past"):
                        yield self._rows(database, "journal", table, self._step, clear=True)
                for table in ("steps", "metrics"):
                    yield self._rows(database, "journal", table, self._step, clear=fresh)
                self._step = last
                yield from self._events(database)
                for table in SMALL_TABLES:
                    found = database.rows(f"SELECT * FROM {table}")  # noqa: S608 - constants
                    if found != self._small.get(table):
                        self._small[table] = found
                        yield Rows(
                            "journal", table, _columns(database, table), [list(r) for r in found],
                            clear=True,
                        )  # fmt: skip
        finally:
            database.close()

    def _events(self, database: ReadOnlyDatabase) -> Iterator[Message]:
        rows = database.rows("SELECT * FROM events WHERE id > ? ORDER BY id", (self._event,))
        if rows:
            self._event = rows[-1][0]
            yield Rows("journal", "events", _columns(database, "events"), [list(r) for r in rows])

    def _samples(self) -> Iterator[Message]:
        database = ReadOnlyDatabase(self._session.samples_file, schema.SAMPLES)
        try:
            kept = SAMPLES[: 1 + (database.version >= schema.EVALUATED_ARE_KEPT)]
            for table in kept if database.connection is not None else ():
                yield self._rows(database, "samples", table, self._sampled, clear=self._fresh)
            self._sampled = self._step
        finally:
            database.close()

    def _judgements(self) -> Iterator[Message]:
        if (changed := file_signature(self._session.labels_file)) == self._labels:
            return
        self._labels = changed
        database = ReadOnlyDatabase(self._session.labels_file, schema.LABELS)
        try:
            for table in LABELS if database.connection is not None else ():
                rows = database.rows(f"SELECT * FROM {table}")  # noqa: S608 - constants
                columns = _columns(database, table)
                yield Rows("labels", table, columns, [list(r) for r in rows], clear=True)
        finally:
            database.close()

    def _log(self, path: Path) -> Iterator[Message]:
        try:
            size = path.stat().st_size
            if self._log_at < 0:
                self._log_at = max(size - LOG_BYTES, 0)
            if size <= self._log_at:
                return
            with open_to_read(path) as file:
                file.seek(self._log_at)
                while data := file.read(min(LOG_BYTES, size - self._log_at)):
                    self._log_at += len(data)
                    yield Log(data.decode("utf-8", "replace"))
        except OSError:
            return  # the log is not what the session depends on

    @staticmethod
    def _rows(
        database: ReadOnlyDatabase, file: str, table: str, after: int, *, clear: bool
    ) -> Rows:
        found = database.rows(f"SELECT * FROM {table} WHERE step > ?", (after,))  # noqa: S608 - constants
        return Rows(file, table, _columns(database, table), [list(r) for r in found], clear=clear)


def _columns(database: ReadOnlyDatabase, table: str) -> list[str]:
    return [row[0] for row in database.rows("SELECT name FROM pragma_table_info(?)", (table,))]
