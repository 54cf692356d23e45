"""Writes the journal and the samples of a session. The supervisor is the only writer.

Samples are in a separate file, so that reading metrics does not page through text. A step is
one transaction in each file, samples first. A crash between the two leaves samples of a step that
is not in the journal; the next attempt overwrites them.
"""

import json
import os
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec

from engine import __version__
from engine.errors import JournalError
from engine.journal import schema
from engine.journal.database import check_rollback_journal, check_schema, write_problem
from engine.journal.json_values import finite
from engine.journal.logs.checkpoint_log import AdoptedCheckpoint, CheckpointLog
from engine.journal.logs.command_log import CommandLog
from engine.journal.logs.event_log import EventLog
from engine.journal.write_ahead_log import WriteAheadLog
from engine.metrics import EVAL_SCORE
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Placed, Sample, StepReport
from engine.session import access
from engine.session.folder import SessionFolder
from engine.session.machine import on_network

OPEN_TIMEOUT = 30.0
"""Seconds to wait for other programs that lock the files, at the start and at the end."""
LOCK_TIMEOUT = 2.0
"""The same while the run lives. The event loop is blocked meanwhile."""


class JournalWriter:
    """Writes the journal and the samples. Only the holder of the session's lock may open it."""

    def __init__(self, session: SessionFolder) -> None:
        """Opens both files, after creating or migrating them.

        Raises:
            JournalError: a file cannot be opened, or a newer version wrote it.
        """
        mode = "TRUNCATE" if on_network(session.folder) else "WAL"
        self._db = _open(session.journal_file, schema.JOURNAL, mode)
        self._samples = _open(session.samples_file, schema.SAMPLES, mode)
        self._log = WriteAheadLog(self._db, session.journal_file)
        self._samples_log = WriteAheadLog(self._samples, session.samples_file)
        self._file = session.journal_file
        self._opened = os.stat(self._file)  # noqa: PTH116 - like the check
        self._events = EventLog(self._db)
        self._began = False
        """Whether the current attempt is of this process."""
        self._earlier_attempts = self._events.attempt
        """Number of the last attempt of other processes."""
        self.commands = CommandLog(self._db, self._events)
        self.checkpoints = CheckpointLog(self._db, self._events, self._samples_log.file)

    def begin_serving(self) -> None:
        """Waits only briefly for a locked file from now on: the event loop has other work."""
        self._wait_for_locks(LOCK_TIMEOUT)

    def _wait_for_locks(self, seconds: float) -> None:
        for db in (self._db, self._samples):
            db.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def check_unlocked(self) -> None:
        """Checks, without waiting, that no other program keeps this one from writing.

        Raises:
            sqlite3.OperationalError: one does, see :func:`is_busy`.
        """
        self._wait_for_locks(0.0)
        try:
            for db in (self._db, self._samples):
                db.execute("BEGIN EXCLUSIVE")  # without WAL, readers are in the way, too
                db.rollback()
        finally:
            self._wait_for_locks(LOCK_TIMEOUT)

    def is_in_place(self) -> bool:
        """Whether the session's folder still holds the open journal.

        False once the folder is moved, deleted or replaced. What is written goes on to the open
        files, but checkpoints of this run no longer have a place.
        """
        try:
            found = os.stat(self._file)  # noqa: PTH116 - called every few seconds
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # such as a network file system that does not answer
            return True
        return os.path.samestat(found, self._opened)

    @property
    def file_id(self) -> tuple[int, int]:
        """The device and inode of the open journal."""
        return self._opened.st_dev, self._opened.st_ino

    @property
    def attempt(self) -> int:
        """Number of the current attempt, from 1."""
        return self._events.attempt

    @property
    def step(self) -> int:
        """The last finished step of the current timeline."""
        return self._events.step

    @property
    def last_event(self) -> int:
        """Id of the newest event."""
        return self._events.last

    def close(self) -> None:
        """Records the end of the attempt, if this writer began it, and closes the files.

        An attempt of a killed engine stays without an end, which tells readers that it died.
        """
        try:
            self._wait_for_locks(OPEN_TIMEOUT)
            if self._began:
                with self._db:
                    self._db.execute(
                        "UPDATE attempts SET ended = ? WHERE attempt = ? AND ended IS NULL",
                        (time.time(), self.attempt),
                    )
        finally:
            self._db.close()
            self._samples.close()

    # -- attempts and the timeline ---------------------------------------------------------

    def begin_attempt(
        self,
        from_step: int,
        *,
        fresh: bool,
        reseed: bool = False,
        origin: dict[str, Any] | None = None,
        adopt: AdoptedCheckpoint | None = None,
        total_steps: int = 0,
    ) -> None:
        """Begins an attempt. Rows of later steps move from the timeline to an abandoned branch.

        From step 0 that includes the evaluation before the first step, which is repeated.

        Args:
            from_step: step of the checkpoint that the attempt starts from, 0 for none.
            fresh: whether to discard changes of settings after that step (--from, fork, rollback)
                instead of repeating them (resume).
            reseed: whether this and later attempts from the same step sample with another seed.
            origin: for a fork, the source session and step.
            adopt: the checkpoint of `from_step`, if it is missing from this journal.
            total_steps: `train.steps`, for a replay; 0 if unknown.
        """
        with self._db:
            self._supersede(from_step, fresh)
            self._events.attempt += 1
            new_engine, self._began = not self._began, True
            if reseed:
                self._set_meta({"reseed": [from_step, self.attempt]})
            self._db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, NULL, ?, ?, ?)",
                (self.attempt, from_step, fresh, time.time(), os.getpid(), socket.gethostname(),
                 __version__),
            )  # fmt: skip
            if adopt is not None:
                self.checkpoints.adopt(from_step, adopt)
            data = {
                "attempt": self.attempt, "from_step": from_step, "fresh": fresh,
                "new_engine": new_engine, "total_steps": total_steps,
            }  # fmt: skip
            self._events.write("attempt", data | ({"fork": origin} if origin else {}), from_step)
        self._events.step = from_step
        self._move_samples(from_step)

    def _move_samples(self, from_step: int) -> None:
        """Moves the samples of later steps after their steps.

        If the process is killed in between, the next attempt moves them: it starts from the same
        checkpoint or an earlier one. In the other order it might start from a later one.
        """
        after = from_step or -1
        with self._samples:
            for table in ("samples", "evaluated"):
                self._samples.execute(
                    f"INSERT OR REPLACE INTO {table}_past ({schema.SAMPLE_COLUMNS}) "  # noqa: S608 - constants
                    f"SELECT {schema.SAMPLE_COLUMNS} FROM {table} WHERE step > ?",
                    (after,),
                )
                self._samples.execute(
                    f"DELETE FROM {table} WHERE step > ?",  # noqa: S608 - constants
                    (after,),
                )
            self._samples.execute("DELETE FROM arrays WHERE step > ?", (from_step,))

    def _supersede(self, from_step: int, fresh: bool) -> None:
        parameters = (from_step,)
        self._db.execute(
            "INSERT INTO metrics_past SELECT m.name, s.attempt, m.step, m.value "
            "FROM metrics m JOIN steps s ON s.step = m.step WHERE m.step > ?",
            parameters,
        )
        self._db.execute(
            "INSERT INTO steps_past SELECT attempt, step, time FROM steps WHERE step > ?",
            parameters,
        )
        if not from_step:  # an evaluation before the first step has no row in `steps`
            self._db.execute(
                "INSERT OR REPLACE INTO metrics_past SELECT name, "
                "(SELECT max(attempt) FROM attempts WHERE from_step = 0), step, value "
                "FROM metrics WHERE step = 0"
            )
        self._db.execute("DELETE FROM metrics WHERE step > ?", (from_step or -1,))
        self._db.execute("DELETE FROM steps WHERE step > ?", parameters)
        self.checkpoints.supersede(from_step)
        self._db.execute(
            "DELETE FROM meta WHERE key = 'reseed' AND (? OR json_extract(value, '$[0]') > ?)",
            (fresh, from_step),
        )
        if fresh:
            self._db.execute("UPDATE commands SET live = 0 WHERE applied_step > ?", parameters)

    def reseeded(self, step: int) -> int:
        """The attempt that was started with `--reseed` from this step; 0 if there was none."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'reseed'").fetchone()
        at, attempt = json.loads(row[0]) if row else (0, 0)
        return int(attempt) if at == step else 0

    def forked_from_average(self, step: int) -> bool:
        """Whether the session is a fork that began with the averaged policy of this step."""
        row = self._db.execute(
            "SELECT json_extract(data, '$.fork.step'), json_extract(data, '$.fork.ema') "
            "FROM events WHERE kind = 'attempt' AND json_extract(data, '$.fork') IS NOT NULL "
            "ORDER BY id DESC LIMIT 1"  # a fork of a fork has the events of both
        ).fetchone()
        return row is not None and row[0] == step and bool(row[1])

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the current timeline has this step, but no evaluation after it."""
        rows = self._db.execute(
            "SELECT 1 FROM steps WHERE step = :step AND NOT EXISTS (SELECT 1 FROM metrics "
            "WHERE step = :step AND name = (SELECT id FROM names WHERE name = :name))",
            {"step": step, "name": EVAL_SCORE},
        )
        return rows.fetchone() is not None

    def recorded_metrics(self, step: int) -> list[str]:
        """The metrics of a step of the current timeline that this process recorded, else none."""
        rows = self._db.execute(
            "SELECT n.name FROM steps s JOIN metrics m ON m.step = s.step "
            "JOIN names n ON n.id = m.name WHERE s.step = ? AND s.attempt > ?",
            (step, self._earlier_attempts),
        )
        return [name for (name,) in rows]

    def placed(self) -> Placed | None:
        """How the models were placed in the last attempt that loaded them; None before that."""
        row = self._db.execute(
            "SELECT data FROM events WHERE kind = 'ready' ORDER BY id DESC LIMIT 1"
        ).fetchone()
        info = json.loads(row[0]) if row is not None else {}
        if "ranks" not in info or "strategy" not in info:  # of an earlier version
            return None
        return Placed(
            ranks=info["ranks"], strategy=info["strategy"], device=str(info.get("device", ""))
        )

    # -- rows of an attempt ---------------------------------------------------------------

    def set_meta(self, **values: Any) -> None:
        """Sets fields of :class:`~engine.journal.rows.SessionMeta`."""
        with self._db:
            self._set_meta(values)

    def record_step(self, report: StepReport) -> None:
        """Writes the metrics, settings and samples of a finished step."""
        with self._samples:
            for sample in report.samples:
                self._sample("samples", report.step, sample)
            for sample in report.evaluated:
                self._sample("evaluated", report.step, sample)
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO steps VALUES (?, ?, ?)",
                (report.step, self.attempt, time.time()),
            )
            self._metrics(report.step, report.metrics)
            self._set_meta({"settings": report.settings})
        self._events.step = report.step
        for log in (self._samples_log, self._log):
            log.shorten()

    def record_evaluation(
        self, step: int, metrics: dict[str, float], samples: list[Sample]
    ) -> None:
        """Writes an evaluation that is not in a step's report; step 0 is before the first step."""
        with self._samples:
            for sample in samples:
                self._sample("evaluated", step, sample)
        with self._db:
            self._metrics(step, metrics)

    def _metrics(self, step: int, metrics: dict[str, float]) -> None:
        names = [(name,) for name in metrics]
        self._db.executemany("INSERT OR IGNORE INTO names (name) VALUES (?)", names)
        self._db.executemany(
            "INSERT OR REPLACE INTO metrics SELECT id, ?, ? FROM names WHERE name = ?",
            [(step, finite(v), k) for k, v in metrics.items()],
        )

    def _sample(self, table: str, step: int, sample: Sample) -> None:
        self._samples.execute(
            f"INSERT OR REPLACE INTO {table} "  # noqa: S608 - one of two names
            f"({schema.SAMPLE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (step, sample.index, self.attempt, sample.prompt, sample.response,
             finite(sample.score), finite(sample.kl), sample.length, sample.ended,
             json.dumps(finite(sample.parts)), sample.weights_version,
             None if sample.replies is None else json.dumps(sample.replies),
             None if sample.messages is None else msgspec.json.encode(sample.messages).decode(),
             json.dumps(sample.turn_scores) if sample.turn_scores else None),
        )  # fmt: skip
        if sample.arrays is not None:
            self._samples.execute(
                "INSERT OR REPLACE INTO arrays VALUES (?, ?, ?)",
                (step, sample.index, msgspec.msgpack.encode(sample.arrays)),
            )

    def record_event(self, kind: str, data: dict[str, Any], step: int | None = None) -> None:
        """Writes an event, see :meth:`EventLog.write`."""
        with self._db:
            self._events.write(kind, data, step)

    def record_telemetry(self, telemetry: Telemetry) -> None:
        """Writes one reading of the machine."""
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO telemetry VALUES (?, ?)",
                (telemetry.time, msgspec.json.encode(telemetry).decode()),
            )

    def delete_checkpoint(self, step: int, command_id: str) -> None:
        """Records that a command has removed a checkpoint; call it before its files are removed.

        This is one transaction: a command that a kill leaves unfinished has removed nothing.
        """
        with self._db:
            self.checkpoints.remove(step)
            self.commands.apply(command_id, self.step + 1, [])  # commits both

    # -- inside a transaction -----------------------------------------------------------------

    def _set_meta(self, values: dict[str, Any]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(k, json.dumps(finite(v))) for k, v in values.items()],
        )


def is_busy(error: sqlite3.Error) -> bool:
    """Whether an error means that another program keeps a file locked."""
    # The low byte is the kind of error, the rest its details. There is none if Python raised it.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _open(path: Path, migrations: list[str], mode: str) -> sqlite3.Connection:
    try:
        access.create_file(path)
        check_rollback_journal(path)
        db = sqlite3.connect(path, timeout=OPEN_TIMEOUT)
        check_schema(db, path)
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("PRAGMA synchronous = NORMAL")
        schema.migrate(db, migrations, path)
    except (OSError, sqlite3.Error) as error:
        raise JournalError(f"cannot open {path}: {write_problem(error)}") from error
    return db
