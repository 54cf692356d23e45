"""A copy of a session on another machine: a folder that readers and clients use like any other."""

import sqlite3
from pathlib import Path
from socket import gethostname

import msgspec

from engine import __version__
from engine.errors import LinkError
from engine.journal import schema
from engine.session.engine_info import EngineInfo
from engine.session.folder import SessionFolder, check_name, write_atomically
from engine.session.lock import SessionLock
from rlhf_tui.remote.messages import VERSION, EngineState, Hello, Log, Message, Rows

MIGRATIONS = {"journal": schema.JOURNAL, "samples": schema.SAMPLES, "labels": schema.LABELS}


class SessionCopy:
    """Writes what a source sends into a folder of its own, never into the session."""

    def __init__(self, root: Path, socket: Path) -> None:
        """Creates a copy below `root`; `socket` is the path of the forwarded engine socket."""
        self._root = root
        self._socket = socket
        self._databases: dict[str, sqlite3.Connection] = {}
        self._columns: dict[str, set[str]] = {}
        self._lock: SessionLock | None = None
        self.session: SessionFolder | None = None
        """None before the first message."""
        self.remote_socket: str | None = None
        """The path of the engine's socket on its machine; None without an engine."""

    def take(self, message: Message) -> None:
        """Writes a message. Raises LinkError, SessionError, sqlite3.Error or OSError."""
        match message:
            case Hello():
                self._begin(message)
            case Rows():
                self._write(message)
            case Log(text=text) if self.session is not None:
                with self.session.log_file.open("a", encoding="utf-8") as file:
                    file.write(text)
            case EngineState():
                self._engine(message)
            case _:  # Done
                for database in self._databases.values():
                    database.commit()

    def close(self) -> None:
        """Closes the files."""
        for database in self._databases.values():
            database.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise LinkError("the other machine has another version of rlhf-tui; use the same one")
        session = SessionFolder(self._root / check_name(hello.name))
        session.folder.mkdir(mode=0o700, exist_ok=True)
        session.checkpoints.mkdir(mode=0o700, exist_ok=True)
        session.config_file.write_text(hello.config, encoding="utf-8")
        session.log_file.write_text("", encoding="utf-8")
        for file, migrations in MIGRATIONS.items():
            if file not in self._databases:
                path = session.folder / f"{file}.db"
                database = sqlite3.connect(path, timeout=10.0, check_same_thread=False)
                database.execute(f"PRAGMA journal_mode = {'DELETE' if file == 'labels' else 'WAL'}")
                schema.migrate(database, migrations, path)
                self._databases[file] = database
        self.session = session

    def _write(self, rows: Rows) -> None:
        database = self._databases.get(rows.file)
        if database is None:
            raise LinkError(f"the other machine sent rows of an unknown file: {rows.file!r}")
        known = self._known(rows.file, rows.table)
        if not known:
            return  # a table of another version
        kept = [i for i, name in enumerate(rows.columns) if name in known]
        if rows.clear:
            database.execute(f"DELETE FROM {rows.table}")  # noqa: S608 - a table of the schema
        if not kept or not rows.rows:
            return  # there is no journal yet
        names = ", ".join(rows.columns[i] for i in kept)
        marks = ", ".join("?" * len(kept))
        database.executemany(
            f"INSERT OR REPLACE INTO {rows.table} ({names}) VALUES ({marks})",  # noqa: S608 - names of the schema
            [[row[i] for i in kept] for row in rows.rows],
        )

    def _known(self, file: str, table: str) -> set[str]:
        """The columns of one of our tables; empty if there is no such table."""
        key = f"{file}.{table}"
        if key not in self._columns:
            query = "SELECT name FROM pragma_table_info(?)"
            self._columns[key] = {r[0] for r in self._databases[file].execute(query, (table,))}
        return self._columns[key]

    def _engine(self, engine: EngineState) -> None:
        """Makes the copy look live while the session is, by its lock and by engine.json."""
        if self.session is None:
            return
        self.remote_socket = engine.socket
        if engine.socket is None:
            self.session.engine_file.unlink(missing_ok=True)
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            return
        info = EngineInfo(engine.pid, gethostname(), str(self._socket), __version__)
        write_atomically(self.session.engine_file, msgspec.json.encode(info).decode() + "\n")
        if self._lock is None:
            self._lock = SessionLock(self.session.lock_file)
