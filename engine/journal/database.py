"""A session's databases as everybody reads them: short reads, never a write."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from engine.errors import JournalError
from engine.journal import schema
from engine.session.folder import Session

Row = dict[str, Any]


class DatabaseReader:
    """Databases of one session; one that is not there reads as empty."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._open: list[sqlite3.Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for db in self._open:
            db.close()

    def _opened(self, path: Path, migrations: list[str]) -> sqlite3.Connection | None:
        db = open_read_only(path, len(migrations))
        if db is not None:
            self._open.append(db)
        return db

    def _all(
        self, db: sqlite3.Connection | None, query: str, values: Iterable[Any] | Row = ()
    ) -> list[Any]:
        if db is None:
            return []
        try:
            return db.execute(
                query, values if isinstance(values, dict) else tuple(values)
            ).fetchall()
        except sqlite3.Error as error:
            raise JournalError(
                f"cannot read the journal of {self.session.folder}: {error}"
            ) from error

    def _rows(
        self, db: sqlite3.Connection | None, query: str, values: Iterable[Any] | Row = ()
    ) -> list[Row]:
        if db is None:
            return []
        db.row_factory = sqlite3.Row
        try:
            return [dict(r) for r in self._all(db, query, values)]
        finally:
            db.row_factory = None


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
