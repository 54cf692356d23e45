"""The events in the journal, each recorded with its attempt and step."""

import json
import sqlite3
import time
from typing import Any

from engine.journal.json_values import finite


class EventLog:
    """Writes events in the open transaction, so an event and its cause are committed together."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """Reads the last attempt, step and event of the journal."""
        self._db = db
        self.attempt: int = self._newest("SELECT max(attempt) FROM attempts")
        self.step: int = self._newest("SELECT max(step) FROM steps")
        """The last finished step."""
        self.last: int = self._newest("SELECT max(id) FROM events")
        """Id of the newest event."""

    def _newest(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0] or 0)

    def write(self, kind: str, data: dict[str, Any], step: int | None = None) -> None:
        """Writes an event of the current attempt.

        Args:
            kind: of the event, a key of :data:`engine.journal.rows.PAYLOADS`.
            data: the payload.
            step: at which it occurred; the last finished step if None.
        """
        cursor = self._db.execute(
            "INSERT INTO events (time, attempt, step, kind, data) VALUES (?, ?, ?, ?, ?)",
            (time.time(), self.attempt, self.step if step is None else step, kind,
             json.dumps(finite(data))),
        )  # fmt: skip
        self.last = int(cursor.lastrowid or 0)
