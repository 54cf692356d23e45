"""The journal as the supervisor writes it: the one and only writer of a session's record.

Two SQLite files, the record itself and the samples, so that charts never page through text. A step
is one transaction in each, samples first: a crash between the two leaves samples of a step that the
journal does not know, and the next attempt writes them again.
"""

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from engine import __version__
from engine.errors import JournalError
from engine.journal import schema
from engine.journal.command_log import CommandLog
from engine.journal.database import open_read_only
from engine.journal.event_log import EventLog
from engine.journal.json_values import finite
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Sample, StepReport
from engine.session.folder import Session

NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "afs", "ceph",
    "9p", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs",
}  # fmt: skip
"""Where WAL's shared memory does not work between hosts."""


class AdoptedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A complete checkpoint on disk that the journal does not know."""

    size: int
    """Bytes."""
    score: float | None
    kl: float | None
    """Of its step; None where they cannot be read."""


class JournalWriter:
    """Opened by the holder of the session's lock, for one attempt at a time."""

    def __init__(self, session: Session) -> None:
        """Opens both files, makes or migrates them.

        Raises:
            JournalError: they cannot be opened or belong to a newer version.
        """
        mode = "TRUNCATE" if on_network(session.folder) else "WAL"
        self._db = _open(session.journal_file, schema.JOURNAL, mode)
        self._samples = _open(session.samples_file, schema.SAMPLES, mode)
        self._names: dict[str, int] = dict(self._db.execute("SELECT name, id FROM names"))
        self._events = EventLog(self._db)
        self.commands = CommandLog(self._db, self._events)

    @property
    def attempt(self) -> int:
        """The present attempt's number, from 1."""
        return self._events.attempt

    @property
    def step(self) -> int:
        """The last finished step of the current timeline."""
        return self._events.step

    @property
    def last_event(self) -> int:
        """The newest event's id."""
        return self._events.last

    def close(self) -> None:
        """Ends the attempt and closes the files."""
        with self._db:
            self._db.execute(
                "UPDATE attempts SET ended = ? WHERE attempt = ? AND ended IS NULL",
                (time.time(), self.attempt),
            )
        self._db.close()
        self._samples.close()

    # -- attempts and their timeline ---------------------------------------------------------

    def begin_attempt(
        self,
        from_step: int,
        *,
        fresh: bool,
        reseed: bool = False,
        origin: dict[str, Any] | None = None,
        adopt: AdoptedCheckpoint | None = None,
    ) -> int:
        """A new attempt that goes on from a step; what was written after it leaves the timeline.

        Args:
            from_step: the checkpoint's step, 0 for the start.
            fresh: settings changed after that step are forgotten too (--from, fork, roll back);
                else they will be applied again (a resume).
            reseed: it samples anew; so does any that goes on from the same step after it.
            origin: of a fork, where it comes from.
            adopt: the checkpoint of `from_step`, where this journal does not know it.

        Returns:
            The attempt's number, from 1.
        """
        with self._samples:
            columns = "step, idx, attempt, prompt, response, score, kl, length, ended, parts"
            self._samples.execute(
                f"INSERT OR REPLACE INTO samples_past ({columns}) "  # noqa: S608 - a constant
                f"SELECT {columns} FROM samples WHERE step > ?",
                (from_step,),
            )
            self._samples.execute("DELETE FROM samples WHERE step > ?", (from_step,))
            self._samples.execute("DELETE FROM arrays WHERE step > ?", (from_step,))
        with self._db:
            self._supersede(from_step, fresh)
            self._events.attempt += 1
            if reseed:
                self._set_meta({"reseed": [from_step, self.attempt]})
            self._db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, NULL, ?, ?, ?)",
                (self.attempt, from_step, fresh, time.time(), os.getpid(), socket.gethostname(),
                 __version__),
            )  # fmt: skip
            if adopt is not None:
                self._db.execute(
                    "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 'complete')",
                    (from_step, self.attempt, time.time(), adopt.size, adopt.score, adopt.kl),
                )
            self._events.step = from_step
            data = {"attempt": self.attempt, "from_step": from_step, "fresh": fresh}
            self._events.write("attempt", data | ({"fork": origin} if origin else {}))
        return self.attempt

    def _supersede(self, from_step: int, fresh: bool) -> None:
        after = (from_step,)
        self._db.execute(
            "INSERT INTO metrics_past SELECT m.name, s.attempt, m.step, m.value "
            "FROM metrics m JOIN steps s ON s.step = m.step WHERE m.step > ?",
            after,
        )
        self._db.execute(
            "INSERT INTO steps_past SELECT attempt, step, time FROM steps WHERE step > ?", after
        )
        self._db.execute("DELETE FROM metrics WHERE step > ?", after)
        self._db.execute("DELETE FROM steps WHERE step > ?", after)
        # The checkpoint we resume from is complete, even if its rank died before reporting it.
        written = "SELECT attempt FROM checkpoints WHERE step = ? AND status = 'written'"
        for (attempt,) in self._db.execute(written, after).fetchall():
            self._complete(from_step, attempt)
        # One that is only written may be whole on the disk, or become so: nobody goes on from it.
        self._db.execute(
            "UPDATE checkpoints SET status = iif(status = 'written', 'abandoned', 'superseded') "
            "WHERE step > ? AND status IN ('complete', 'written')",
            after,
        )
        self._db.execute(
            "DELETE FROM meta WHERE key = 'reseed' AND (? OR json_extract(value, '$[0]') > ?)",
            (fresh, from_step),
        )
        if fresh:
            self._db.execute("UPDATE commands SET live = 0 WHERE applied_step > ?", after)

    def reseeded(self, step: int) -> int:
        """The attempt that was to sample anew from this very step on; 0 where none was."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'reseed'").fetchone()
        at, attempt = json.loads(row[0]) if row else (0, 0)
        return int(attempt) if at == step else 0

    def timeline(self) -> list[int]:
        """Steps whose checkpoints are of the current timeline."""
        query = "SELECT step FROM checkpoints WHERE status IN ('complete', 'written') ORDER BY step"
        return [row[0] for row in self._db.execute(query)]

    # -- what an attempt writes ---------------------------------------------------------------

    def set_meta(self, **values: Any) -> None:
        """Keeps small facts: state, total_steps, settings, message."""
        with self._db:
            self._set_meta(values)

    def record_step(self, report: StepReport) -> None:
        """One finished step: metrics, settings, samples."""
        with self._samples:
            for sample in report.samples:
                self._sample(report.step, sample)
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO steps VALUES (?, ?, ?)",
                (report.step, self.attempt, time.time()),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)",
                [(self._name(k), report.step, finite(v)) for k, v in report.metrics.items()],
            )
            self._set_meta({"settings": report.settings})
            self._events.step = report.step

    def _sample(self, step: int, sample: Sample) -> None:
        self._samples.execute(
            "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (step, sample.index, self.attempt, sample.prompt, sample.response,
             finite(sample.score), finite(sample.kl), sample.length, sample.ended,
             json.dumps(finite(sample.parts))),
        )  # fmt: skip
        if sample.arrays is not None:
            self._samples.execute(
                "INSERT OR REPLACE INTO arrays VALUES (?, ?, ?)",
                (step, sample.index, msgspec.msgpack.encode(sample.arrays)),
            )

    def record_event(self, kind: str, data: dict[str, Any], step: int | None = None) -> int:
        """An event for ever: state, alert, error, note, checkpoint. Returns its id."""
        with self._db:
            return self._events.write(kind, data, step)

    def record_telemetry(self, telemetry: Telemetry) -> None:
        """One reading of the machine."""
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO telemetry VALUES (?, ?)",
                (telemetry.time, msgspec.json.encode(telemetry).decode()),
            )

    def record_checkpoint(self, step: int, size: int, score: float, kl: float) -> None:
        """A checkpoint is on disk but for its COMPLETE.

        Everything before it is forced to the disk first: a COMPLETE checkpoint must never be ahead
        of the journal, not even after a power cut.
        """
        self._db.execute("PRAGMA synchronous = FULL")
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 'written')",
                (step, self.attempt, time.time(), size, score, kl),
            )
        self._db.execute("PRAGMA synchronous = NORMAL")

    def complete_checkpoint(self, step: int, removed: Iterable[int] = ()) -> None:
        """Its COMPLETE is written: it can be resumed from, and older ones make way for it."""
        with self._db:
            self._complete(step, self.attempt)
            self._db.executemany(
                "UPDATE checkpoints SET status = 'removed' WHERE step = ?", [(s,) for s in removed]
            )

    # -- inside a transaction -----------------------------------------------------------------

    def _complete(self, step: int, attempt: int) -> None:
        """A folder is one attempt's whole checkpoint, and no earlier one's any more."""
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

    def _set_meta(self, values: dict[str, Any]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(k, json.dumps(finite(v))) for k, v in values.items()],
        )

    def _name(self, name: str) -> int:
        if name not in self._names:
            row = self._db.execute("INSERT INTO names (name) VALUES (?) RETURNING id", (name,))
            self._names[name] = int(row.fetchone()[0])
        return self._names[name]


def copy_until(source: Session, target: Session, step: int) -> None:
    """Copies journal and samples into a new session, up to a step. Raises sqlite3.Error."""
    for old, new, newest, cuts in (
        (source.journal_file, target.journal_file, len(schema.JOURNAL), _CUT),
        (source.samples_file, target.samples_file, len(schema.SAMPLES), _CUT_SAMPLES),
    ):
        reader = open_read_only(old, newest)
        if reader is None:
            continue
        with closing(reader), closing(sqlite3.connect(new)) as writer:
            reader.backup(writer)
            with writer:
                for query in cuts:
                    writer.execute(query, {"step": step})


_CUT = (
    "DELETE FROM metrics WHERE step > :step",
    "DELETE FROM steps WHERE step > :step",
    "DELETE FROM metrics_past",
    "DELETE FROM steps_past",
    "DELETE FROM events WHERE step > :step OR (kind = 'command' AND json_extract(data, '$.id') IN "
    "(SELECT id FROM commands WHERE live = 0 OR applied_step IS NULL OR applied_step > :step))",
    "DELETE FROM commands WHERE live = 0 OR applied_step IS NULL OR applied_step > :step",
    "DELETE FROM meta WHERE key = 'reseed'",
    "DELETE FROM checkpoints WHERE step <> :step",
    "UPDATE checkpoints SET status = 'complete'",
)
_CUT_SAMPLES = (
    "DELETE FROM samples WHERE step > :step",
    "DELETE FROM arrays WHERE step > :step",
    "DELETE FROM samples_past",
)


def on_network(folder: Path) -> bool:
    """Whether a folder lies on a network file system (from /proc/self/mountinfo)."""
    best, kind = -1, ""
    path = str(folder.resolve())
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), after.split()[0]
    return kind in NETWORK_FILE_SYSTEMS


def _open(path: Path, migrations: list[str], mode: str) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=30.0)
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("PRAGMA synchronous = NORMAL")
        schema.migrate(db, migrations, path)
    except sqlite3.Error as error:
        raise JournalError(f"cannot open {path}: {error}") from error
    return db
