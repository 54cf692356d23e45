"""One SQLite file of a session as everybody reads it: short reads, never a write."""

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import JournalError
from engine.journal import schema

Values = Iterable[Any] | Mapping[str, Any]
"""A query's parameters, by place or by name: whatever SQLite can hold."""


class ReadOnlyDatabase:
    """A database that reads as empty where there is none yet."""

    def __init__(self, path: Path, migrations: list[str]) -> None:
        """Opens it.

        Raises:
            JournalError: it cannot be read, or a newer version wrote it.
        """
        self._path = path
        self.connection = open_read_only(path, len(migrations))
        """None where there is no database, or none is finished yet."""
        self.version = 0 if self.connection is None else schema.schema_version(self.connection)
        """How many migrations the file had when it was opened: readers do not migrate."""

    def close(self) -> None:
        """Closes the file."""
        if self.connection is not None:
            self.connection.close()

    def rows(self, query: str, values: Values = ()) -> list[Any]:
        """The tuples of a query; their types are the query's columns, which no checker knows.

        Raises:
            JournalError: the file cannot be read.
        """
        if self.connection is None:
            return []
        given = dict(values) if isinstance(values, Mapping) else tuple(values)
        try:
            return self.connection.execute(query, given).fetchall()
        except sqlite3.Error as error:
            raise JournalError(
                f"cannot read the journal of {self._path.parent}: {error}"
            ) from error


def limit(last: int | None) -> int:
    """SQL's LIMIT for the last N; None for all."""
    return -1 if last is None else last


def open_read_only(path: Path, newest: int) -> sqlite3.Connection | None:
    """Opens a database for reading; None where there is none, or none is finished yet.

    Raises:
        JournalError: it cannot be read, or a newer version wrote it.
    """
    found = connect(path, newest)
    return None if found is None else found[0]


def connect(path: Path, newest: int) -> tuple[sqlite3.Connection, str] | None:
    """As :func:`open_read_only`, with the address by which it could be read."""
    if not path.is_file():
        return None
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        try:
            db = sqlite3.connect(uri, uri=True, timeout=5.0)
            version = schema.schema_version(db)
        except sqlite3.OperationalError:
            # An archived, read-only folder: WAL wants to make a file beside the database there.
            uri += "&immutable=1"
            db = sqlite3.connect(uri, uri=True, timeout=5.0)
            version = schema.schema_version(db)
    except sqlite3.Error as error:
        raise JournalError(f"cannot read {path}: {error}") from error
    if version > newest:
        db.close()
        raise JournalError(f"{path} was written by a newer rlhf-tui; upgrade to read it")
    if version == 0:
        db.close()
        return None
    return db, uri
