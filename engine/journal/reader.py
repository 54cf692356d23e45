"""The journal as everybody else reads it: short reads, never a write.

Live, finished, crashed and archived sessions are read in the same way. Each method is one short
transaction, so that a reader never holds back the writer's checkpointing.
"""

import json
from collections.abc import Iterable
from typing import Any, Self

import msgspec

from engine.config.settings import SettingChange
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase, limit
from engine.journal.rows import (
    AttemptRow,
    CheckpointRow,
    CommandEvent,
    CommandRow,
    EventRow,
    MetricRow,
    ProbeResponse,
    SessionMeta,
    decode_payload,
)
from engine.journal.samples import SampleReader
from engine.session.folder import Session
from engine.session.states import LIVE_STATES

METRICS_SINCE = """
SELECT names.name, step, value FROM names CROSS JOIN metrics
WHERE metrics.name = names.id AND step >= ?
"""
"""One range of the index for each metric: the index begins with the name, so without the names in
front all of it would be read."""
# A range of the index for each span is quicker than grouping all rows; one array is one row.
DOWNSAMPLE_QUERY = """
WITH RECURSIVE spans(first) AS (
    SELECT 1 UNION ALL SELECT first + :width FROM spans WHERE first + :width <= :last
)
SELECT json_group_array(json(
    (SELECT json_array(spans.first, min(value), max(value)) FROM metrics
     WHERE name = (SELECT id FROM names WHERE name = :name)
     AND step >= spans.first AND step < spans.first + :width)
)) FROM spans
"""
NEWEST = """
SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = :name)
AND value IS NOT NULL ORDER BY step DESC LIMIT 1
"""
REFERENCE_PROBES = """
SELECT json_extract(result, '$.reference'), applied_step FROM commands
WHERE command = 'probe' AND status = 'applied' AND json_extract(args, '$.text') = ?
"""
COMMANDS = """
SELECT id, command, args, who, status, queued, accepted, ended, attempt, applied_step, reason,
changes, result, live FROM commands
"""


class JournalReader:
    """What a session's journal says; a session that never began reads as empty.

    Attributes:
        samples: the session's responses, which are a file of their own.
    """

    def __init__(self, session: Session) -> None:
        """Opens the journal and the samples.

        Raises:
            JournalError: one of them cannot be read, or a newer version wrote it.
        """
        self.session = session
        self._db = ReadOnlyDatabase(session.journal_file, schema.JOURNAL)
        self.samples = SampleReader(session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._db.close()
        self.samples.close()

    def meta(self) -> SessionMeta:
        """What the supervisor keeps up to date."""
        rows = self._db.rows("SELECT key, value FROM meta")
        found = {key: json.loads(value) for key, value in rows}
        settings = found.get("settings")
        return SessionMeta(
            state=str(found.get("state", "starting")),
            total_steps=int(found.get("total_steps") or 0),
            settings=settings if isinstance(settings, dict) else None,
            message=str(found.get("message") or ""),
        )

    def state(self) -> str:
        """The session's state; `crashed` where it says it lives and no engine does."""
        # The lock is asked before and after: an engine may end between the two questions.
        live = self.session.is_live()
        state = self.meta().state
        if state in LIVE_STATES and not live and not self.session.is_live():
            state = self.meta().state
            return "crashed" if state in LIVE_STATES else state
        return state

    def last_step(self) -> int:
        """The last completed step, 0 before the first."""
        rows = self._db.rows("SELECT max(step) FROM steps")
        return int(rows[0][0] or 0) if rows else 0

    def attempts(self) -> list[AttemptRow]:
        """Each start of the engine."""
        rows = self._db.rows(
            "SELECT attempt, from_step, fresh, started, ended, pid, host, version "
            "FROM attempts ORDER BY attempt"
        )
        return [
            AttemptRow(
                attempt=attempt, from_step=from_step, fresh=bool(fresh), started=started,
                ended=ended, pid=pid, host=host, version=version,
            )
            for attempt, from_step, fresh, started, ended, pid, host, version in rows
        ]  # fmt: skip

    def metric_names(self) -> list[str]:
        """Every metric that was ever written."""
        return [r[0] for r in self._db.rows("SELECT name FROM names ORDER BY id")]

    def series(self, name: str, after: int = 0) -> list[tuple[int, float | None]]:
        """One metric of the current timeline: (step, value) for steps beyond `after`."""
        return self._db.rows(
            "SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = ?) "
            "AND step > ? ORDER BY step",
            (name, after),
        )

    def outlines(
        self, names: Iterable[str], spans: int
    ) -> dict[str, list[tuple[int, float | None]]]:
        """The shape of long curves: of every span of steps the lowest and the highest value.

        A tenth of the time of :meth:`series`, and one row, so that a thread that asks for it never
        waits for the interpreter between two rows. The newest value stands at the end;
        the others have the 15 digits of SQLite's JSON.

        Args:
            names: metrics of the current timeline.
            spans: into how many spans of equal length the run is divided.

        Returns:
            By metric, (step, value) with steps increasing; metrics without values are left out.
        """
        last = self.last_step()
        width = max(-(-last // spans), 1)
        found = {}
        for name in names:
            rows = self._db.rows(DOWNSAMPLE_QUERY, {"name": name, "last": last, "width": width})
            points: list[tuple[int, float | None]] = []
            for first, low, high in json.loads(rows[0][0]) if rows else ():
                if low is not None:
                    points += [(first, low), *([(first + 1, high)] if width > 1 else [])]
            if points:
                newest = self._db.rows(NEWEST, {"name": name})[0]
                found[name] = [p for p in points if p[0] < newest[0]] + [newest]
        return found

    def past_series(self, name: str) -> list[tuple[int, int, float | None]]:
        """One metric of the timelines that were left: (attempt, step, value)."""
        return self._db.rows(
            "SELECT attempt, step, value FROM metrics_past "
            "WHERE name = (SELECT id FROM names WHERE name = ?) ORDER BY attempt, step",
            (name,),
        )

    def metrics(self, last: int | None = None) -> list[MetricRow]:
        """One row a step of the current timeline."""
        query = "SELECT step, attempt, time FROM steps ORDER BY step DESC LIMIT ?"
        steps = self._db.rows(query, (limit(last),))
        names = dict.fromkeys(self.metric_names())  # after the steps: theirs are among them
        rows = {
            step: MetricRow(step=step, attempt=attempt, time=time, values=dict(names))
            for step, attempt, time in reversed(steps)
        }
        first = next(iter(rows), 0)
        for name, step, value in self._db.rows(METRICS_SINCE, (first,)):
            if step in rows:
                rows[step].values[name] = value
        return list(rows.values())

    def events(self, last: int | None = None, after: int = 0) -> list[EventRow]:
        """Events, oldest first; a command's with its whole life."""
        rows = self._db.rows(
            "SELECT id, time, attempt, step, kind, data FROM events WHERE id > ? "
            "ORDER BY id DESC LIMIT ?",
            (after, limit(last)),
        )
        commands = {c.id: c for c in self.commands()}
        found = []
        for event, time, attempt, step, kind, data in reversed(rows):
            payload = decode_payload(kind, data)
            command = commands.get(payload.id) if isinstance(payload, CommandEvent) else None
            found.append(
                EventRow(
                    event=event, time=time, attempt=attempt, step=step, kind=kind,
                    payload=payload, data=data, command=command,
                )
            )  # fmt: skip
        return found

    def commands(self) -> list[CommandRow]:
        """Every command with its status and, once applied, its changes, in order of arrival."""
        order = "seq" if self._db.version >= schema.COMMANDS_ARE_NUMBERED else "queued"
        return [_command(row) for row in self._db.rows(f"{COMMANDS} ORDER BY {order}")]

    def last_reference_probe(self, prompt: str) -> ProbeResponse | None:
        """What the reference answered to a prompt when somebody last probed with it.

        Returns:
            Its response, with the step after which it was asked; None where nobody asked.
        """
        order = "applied_seq" if self._db.version >= schema.COMMANDS_ARE_NUMBERED else "ended"
        rows = self._db.rows(f"{REFERENCE_PROBES} ORDER BY {order} DESC LIMIT 1", (prompt,))
        if not rows or rows[0][0] is None:
            return None
        found = msgspec.json.decode(rows[0][0], type=ProbeResponse)
        return msgspec.structs.replace(found, step=rows[0][1])

    def checkpoints(
        self, statuses: tuple[str, ...] = ("complete", "superseded")
    ) -> list[CheckpointRow]:
        """Checkpoints, oldest first; by default all that are whole, earlier timelines' too."""
        columns = ", ".join(CheckpointRow.__struct_fields__)
        rows = self._db.rows(
            f"SELECT {columns} FROM checkpoints ORDER BY step, attempt"  # noqa: S608 - ours
        )
        return [c for c in (CheckpointRow(*row) for row in rows) if c.status in statuses]


def _command(row: tuple[Any, ...]) -> CommandRow:
    """From the columns of COMMANDS."""
    (
        command_id, command, args, who, status, queued, accepted, ended, attempt, applied_step,
        reason, changes, result, live,
    ) = row  # fmt: skip
    return CommandRow(
        id=command_id, command=command, args=json.loads(args), who=who, status=status,
        queued=queued, accepted=accepted, ended=ended, attempt=attempt,
        applied_step=applied_step, reason=reason,
        changes=msgspec.json.decode(changes, type=list[SettingChange]),
        result=json.loads(result or "{}"), live=bool(live),
    )  # fmt: skip
