"""Read-only access to one SQLite file of a session, in short reads."""

import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import JournalError
from engine.journal import schema
from engine.session.access import open_to_read

Values = Iterable[Any] | Mapping[str, Any]
"""The parameters of a query, positional or named."""
Views = Callable[[int], list[str]]
"""Returns the statements that create temporary views, for a version of the file's schema."""
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
"""Extended codes of SQLite where a file cannot grow: ENOSPC in a write; any other error of a write,
EDQUOT and EFBIG among them; either in the shared memory of WAL. Other I/O errors are of a disk."""
_JOURNAL_END = bytes.fromhex("d9d505f920a163d7")
"""The last bytes of a rollback journal that names a super-journal."""
MAKE_ROOM = "the disk, or your quota on it, is full: free some space"


class ReadOnlyDatabase:
    """A database opened for reading. A missing one reads as empty until it exists."""

    def __init__(self, path: Path, migrations: list[str], views: Views | None = None) -> None:
        """Opens the file if it exists.

        Args:
            path: of the file.
            migrations: all migrations of this kind of file, see :mod:`engine.journal.schema`.
            views: temporary views that replace the tables of the same names in all queries.

        Raises:
            JournalError: the file cannot be read, or a newer version wrote it.
        """
        self._path = path
        self._migrations = migrations
        self._views = views
        self.connection: sqlite3.Connection | None = None
        """None while the file is missing or has no tables."""
        self.version = 0
        """Number of migrations applied when the file was opened. Readers do not migrate."""
        self._open()

    def _open(self) -> None:
        self.connection = open_read_only(self._path, len(self._migrations))
        if self.connection is None:
            return
        self.version = schema.schema_version(self.connection)
        if self._views is not None:
            self.rows("PRAGMA temp_store = MEMORY")
            for statement in self._views(self.version):
                self.rows(statement)

    def close(self) -> None:
        """Closes the file."""
        if self.connection is not None:
            self.connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Context manager in which all queries see the same rows, whatever is written meanwhile.

        Hold it for seconds at most: on network file systems, which have no WAL, it blocks the
        writer.

        Raises:
            JournalError: the file cannot be read.
        """
        self.rows("BEGIN")
        self.rows("SELECT 1 FROM sqlite_schema LIMIT 1")  # the first read takes the snapshot
        try:
            yield
        finally:
            if self.connection is not None:
                self.connection.rollback()

    def rows(self, query: str, values: Values = ()) -> list[Any]:
        """Runs a query and returns its rows as tuples, which a type checker knows nothing about.

        Raises:
            JournalError: the file cannot be read.
        """
        if self.connection is None:
            # Who follows a session that starts may open the file before it has its tables.
            self._open()
        if self.connection is None:
            return []
        parameters = dict(values) if isinstance(values, Mapping) else tuple(values)
        try:
            return self.connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise JournalError(
                f"cannot read the journal of {self._path.parent}: {error}"
            ) from error

    def value(self, query: str, values: Values = ()) -> Any:
        """Runs a query and returns the first column of its first row; None without rows.

        Raises:
            JournalError: the file cannot be read.
        """
        rows = self.rows(query, values)
        return rows[0][0] if rows else None


def limit(last: int | None) -> int:
    """The value for SQL's LIMIT that returns the last N rows, or all rows if None."""
    return -1 if last is None else last


def open_read_only(path: Path, newest: int) -> sqlite3.Connection | None:
    """Opens a database for reading.

    Args:
        path: of the file.
        newest: number of migrations that this version knows.

    Returns:
        The connection; None if the file is missing or has no tables yet.

    Raises:
        JournalError: the file cannot be read, or a newer version wrote it.
    """
    opened = connect(path, newest)
    return None if opened is None else opened[0]


def connect(path: Path, newest: int) -> tuple[sqlite3.Connection, str] | None:
    """Like :func:`open_read_only`, but also returns the URI that SQLite opened."""
    # Looked at once: an engine that starts may make the file at any moment.
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a loop of symbolic links, a folder of another user
        raise JournalError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise JournalError(f"cannot read {path}: it is not a file; move it away")
    file = path.resolve()
    for beside in (file.with_name(f"{file.name}-{part}") for part in ("journal", "wal", "shm")):
        with suppress(OSError):  # which SQLite reports
            if not stat.S_ISREG(beside.stat().st_mode):  # it would wait for a pipe's other end
                raise JournalError(f"cannot read {beside}: it is not a file; move it away")
    uri = f"{file.as_uri()}?mode=ro"
    try:
        try:
            db = sqlite3.connect(uri, uri=True, timeout=5.0)
            version = schema.schema_version(db)
        except sqlite3.OperationalError:
            # In a read-only folder, SQLite cannot create the shared memory of WAL.
            db, uri = _connect_without_shared_memory(path, uri)
            version = schema.schema_version(db)
        check_schema(db, path)
    except sqlite3.Error as error:
        raise JournalError(f"cannot read {path}: {error}") from error
    if version > newest:
        db.close()
        raise JournalError(f"{path} was written by a newer rlhf-tui; upgrade to read it")
    if version == 0:
        db.close()
        return None
    return db, uri


def _connect_without_shared_memory(path: Path, uri: str) -> tuple[sqlite3.Connection, str]:
    """Connects without locks: in a read-only folder nobody writes.

    If the writer crashed, its last rows are only in the file `-wal`, which `immutable` would
    ignore. In exclusive mode SQLite reads it without shared memory. That mode needs a lock, which a
    file opened for reading cannot have; hence the VFS that takes none.
    """
    wal = path.resolve().with_name(f"{path.resolve().name}-wal")
    if not (wal.is_file() and wal.stat().st_size):
        uri += "&immutable=1"
        return sqlite3.connect(uri, uri=True, timeout=5.0), uri
    uri += "&vfs=unix-none"
    db = sqlite3.connect(uri, uri=True, timeout=5.0)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    return db, uri


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Refuses a database with views, triggers, virtual tables or generated columns: ours have none.

    Somebody has added them by hand. What is read from them is computed, and that may never end, or
    take all memory.

    Raises:
        JournalError: there is one.
        sqlite3.Error: the file cannot be read.
    """
    queries = (
        "SELECT 1 FROM sqlite_schema"
        " WHERE type NOT IN ('table', 'index') OR ifnull(rootpage, 0) = 0",
        "SELECT 1 FROM sqlite_schema AS s, pragma_table_xinfo(s.name) WHERE hidden <> 0",
    )
    if any(db.execute(query).fetchone() is not None for query in queries):
        db.close()
        raise JournalError(f"{path} is not as rlhf-tui writes it: do not trust this session")


def check_rollback_journal(path: Path) -> None:
    """Refuses a rollback journal that SQLite would delete another file for.

    A transaction over several databases has a super-journal; each one's own journal names it, and
    whoever rolls one back deletes it. No transaction here is of that kind: somebody has made the
    journal by hand, to have any file of this user deleted. Call it before a database is opened to
    be written.

    Raises:
        JournalError: the journal beside `path` names a super-journal.
        OSError: it cannot be read.
    """
    journal = path.resolve().with_name(f"{path.resolve().name}-journal")
    try:
        with open_to_read(journal) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_JOURNAL_END)))
            end = file.read()
    except FileNotFoundError:
        return
    if end == _JOURNAL_END:
        raise JournalError(
            f"{journal} is not of rlhf-tui and would delete another file: do not trust this "
            "session; to read it, delete that file"
        )


def has_no_room(error: Exception) -> bool:
    """Whether an error means that a file cannot grow: on a full disk, or beyond a quota."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", 0) in NO_ROOM  # none if Python raised it


def write_problem(error: sqlite3.Error | OSError) -> str:
    """An error's message, with what to do if there is no room for the file."""
    return f"{error}; {MAKE_ROOM}" if has_no_room(error) else str(error)
