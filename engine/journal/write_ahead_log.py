"""Keeps the write-ahead log of a database short, which has readers at all times."""

import contextlib
import sqlite3
from pathlib import Path

WAL_LIMIT = 64 << 20
"""Bytes of a log from which on the writer waits for the readers, to begin it anew."""


class WriteAheadLog:
    """The file `-wal` of a database that this process writes; none on a network file system.

    SQLite copies a log into its database after each 4 MB, but begins it anew only while nobody
    reads. There may be no such moment: a search that a screen repeats with each step can take as
    long as a step. The log then grows by all that is written, and every read becomes slower.
    """

    def __init__(self, db: sqlite3.Connection, database: Path) -> None:
        """Of a file and the connection that writes it."""
        self._db = db
        self.file = database.with_name(f"{database.name}-wal")
        self._limit = WAL_LIMIT

    def shorten(self) -> None:
        """Begins a long log anew. Call it after a transaction.

        Waits for reads that have begun, at most the connection's timeout. Tries again only after
        the log has grown by as much.
        """
        if self._size() < self._limit:
            return
        with contextlib.suppress(sqlite3.Error):  # such as a full disk, which the next step reports
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._limit = self._size() + WAL_LIMIT

    def _size(self) -> int:
        try:
            return self.file.stat().st_size
        except OSError:
            return 0
