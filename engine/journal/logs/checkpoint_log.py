"""The checkpoints in the journal: a row each, with a status.

The status is `written` until COMPLETE is on disk, then `complete`; `removed` once its files are
removed. What a later attempt leaves behind is `superseded`, or `abandoned` if it was not complete;
a checkpoint of the same step that a later attempt has completed is `replaced`.
"""

import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from engine.journal.logs.event_log import EventLog
from engine.session.checkpoints import sync


class AdoptedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A complete checkpoint on disk that is missing from the journal."""

    size: int
    """Bytes."""
    score: float | None
    kl: float | None
    """Score and KL of its step; None if they cannot be read."""


class CheckpointLog:
    """Writes and reads checkpoints."""

    def __init__(self, db: sqlite3.Connection, events: EventLog, samples_wal: Path) -> None:
        """`samples_wal` is the file to sync before a checkpoint, if it exists."""
        self._db = db
        self._events = events
        self._samples_wal = samples_wal

    def record(self, step: int, size: int, score: float | None, kl: float | None) -> None:
        """Records a checkpoint whose files are on disk except COMPLETE.

        Syncs the samples and the journal to disk: a complete checkpoint must never be ahead of
        them, not even after a power failure.

        Args:
            step: of the checkpoint.
            size: in bytes.
            score: mean score of the step.
            kl: mean KL of the step, in nats per response.
        """
        if self._samples_wal.exists():  # without WAL, each transaction has been synced
            sync(self._samples_wal)
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 'written', 0)",
                    (step, self._events.attempt, time.time(), size, score, kl),
                )
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    def complete(self, step: int, removed: Iterable[int] = ()) -> None:
        """Records that COMPLETE is written, and that older checkpoints are removed."""
        with self._db:
            self._complete(step, self._events.attempt)
            for old_step in removed:
                self.remove(old_step)

    def keep(self, step: int) -> None:
        """Records that the checkpoint of a step of the timeline stays until somebody deletes it."""
        with self._db:
            self._db.execute(
                "UPDATE checkpoints SET kept = 1 "
                "WHERE step = ? AND status IN ('complete', 'written')",
                (step,),
            )

    def steps(self) -> list[int]:
        """Steps of the checkpoints of the current timeline."""
        query = "SELECT step FROM checkpoints WHERE status IN ('complete', 'written') ORDER BY step"
        return [row[0] for row in self._db.execute(query)]

    def kept(self) -> list[int]:
        """Those of :meth:`steps` that stay until somebody deletes them."""
        query = "SELECT step FROM checkpoints WHERE kept AND status IN ('complete', 'written')"
        return [row[0] for row in self._db.execute(query)]

    def removed(self) -> dict[int, float]:
        """Step → time of the checkpoints that are removed: no attempt has one that is not.

        The time is that of the last save, just before COMPLETE was written.
        """
        query = (
            "SELECT step, max(time) FROM checkpoints GROUP BY step HAVING min(status = 'removed')"
        )
        return dict(self._db.execute(query).fetchall())

    def kept_on_branches(self) -> dict[int, int]:
        """Step → attempt of the checkpoints that an operator saved on an abandoned branch."""
        query = (
            "SELECT step, max(attempt) FROM checkpoints WHERE kept AND status = 'superseded' "
            "GROUP BY step"
        )
        return dict(self._db.execute(query).fetchall())

    def values(self, metric: str) -> dict[int, float]:
        """A metric by the step of the current timeline's checkpoints, where it is known."""
        values = self._db.execute(
            "SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = ?) "
            "AND value IS NOT NULL AND step IN "
            "(SELECT step FROM checkpoints WHERE status IN ('complete', 'written'))",
            (metric,),
        )
        return dict(values.fetchall())

    # -- inside a transaction -----------------------------------------------------------------

    def adopt(self, step: int, checkpoint: AdoptedCheckpoint) -> None:
        """Records a complete checkpoint that is missing."""
        self._db.execute(
            "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 'complete', 0)",
            (step, self._events.attempt, time.time(), checkpoint.size, checkpoint.score,
             checkpoint.kl),
        )  # fmt: skip

    def remove(self, step: int) -> None:
        """Records that the checkpoint of a step is removed."""
        self._db.execute("UPDATE checkpoints SET status = 'removed' WHERE step = ?", (step,))

    def supersede(self, from_step: int) -> None:
        """Leaves the checkpoints after a step behind, for an attempt that starts from it."""
        # The checkpoint we resume from is complete, even if its rank died before reporting it.
        written = "SELECT attempt FROM checkpoints WHERE step = ? AND status = 'written'"
        for (attempt,) in self._db.execute(written, (from_step,)).fetchall():
            self._complete(from_step, attempt)
        # A written checkpoint may be complete on disk or become so, but must not be resumed from.
        self._db.execute(
            "UPDATE checkpoints SET status = iif(status = 'written', 'abandoned', 'superseded') "
            "WHERE step > ? AND status IN ('complete', 'written')",
            (from_step,),
        )

    def _complete(self, step: int, attempt: int) -> None:
        """Marks a checkpoint as complete, and those of earlier attempts at its step as replaced."""
        self._db.execute(
            "UPDATE checkpoints SET status = 'replaced' WHERE step = ? AND attempt <> ?",
            (step, attempt),
        )
        size, score, kl = self._db.execute(
            "UPDATE checkpoints SET status = 'complete' WHERE step = ? AND attempt = ? "
            "RETURNING size, score, kl",
            (step, attempt),
        ).fetchone()
        self._events.write("checkpoint", {"size": size, "score": score, "kl": kl}, step)
