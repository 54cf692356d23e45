"""The events' part of the journal, and the attempt and step that they are written under."""

import json
import sqlite3
import time
from typing import Any

from engine.journal.json_values import finite


class EventLog:
    """Writes events inside whatever transaction is open, so that each stands beside its cause."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """Goes on from what the journal holds."""
        self._db = db
        self.attempt: int = self._newest("SELECT max(attempt) FROM attempts")
        self.step: int = self._newest("SELECT max(step) FROM steps")
        """The last finished one."""
        self.last: int = self._newest("SELECT max(id) FROM events")
        """The newest event's id."""

    def _newest(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0] or 0)

    def write(self, kind: str, data: dict[str, Any], step: int | None = None) -> int:
        """An event of the present attempt, at a step or at the last finished one; its id."""
        cursor = self._db.execute(
            "INSERT INTO events (time, attempt, step, kind, data) VALUES (?, ?, ?, ?, ?)",
            (time.time(), self.attempt, self.step if step is None else step, kind,
             json.dumps(finite(data))),
        )  # fmt: skip
        self.last = int(cursor.lastrowid or 0)
        return self.last
