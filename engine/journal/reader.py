"""The journal as everybody else reads it: short reads, never a write.

Live, finished, crashed and archived sessions are read in the same way. Each method is one short
transaction, so that a reader never holds back the writer's checkpointing.
"""

import json
from collections.abc import Iterable

import msgspec

from engine.journal import schema
from engine.journal.database import Row, limit
from engine.journal.samples import SampleReader
from engine.protocol.client_messages import Telemetry
from engine.session.folder import Session
from engine.session.states import LIVE_STATES

EVENTS_SINCE = """
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
REFERRED = """
SELECT json_extract(result, '$.reference'), applied_step FROM commands
WHERE command = 'probe' AND status = 'applied' AND json_extract(args, '$.text') = ?
ORDER BY ended DESC LIMIT 1
"""


class JournalReader(SampleReader):
    """What a session's journal says; a session that never began reads as empty."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._db = self._opened(session.journal_file, schema.JOURNAL)

    def meta(self) -> Row:
        """state, total_steps, settings, message: what the supervisor keeps up to date."""
        return {k: json.loads(v) for k, v in self._all(self._db, "SELECT key, value FROM meta")}

    def state(self) -> str:
        """The session's state; `crashed` where it says it lives and no engine does."""
        # The lock is asked before and after: an engine may end between the two questions.
        live = self.session.is_live()
        state = str(self.meta().get("state", "starting"))
        if state in LIVE_STATES and not live and not self.session.is_live():
            state = str(self.meta().get("state", "starting"))
            return "crashed" if state in LIVE_STATES else state
        return state

    def last_step(self) -> int:
        """The last completed step, 0 before the first."""
        rows = self._all(self._db, "SELECT max(step) FROM steps")
        return int(rows[0][0] or 0) if rows else 0

    def attempts(self) -> list[Row]:
        """Each start of the engine."""
        return self._rows(self._db, "SELECT * FROM attempts ORDER BY attempt")

    def metric_names(self) -> list[str]:
        """Every metric that was ever written."""
        return [r[0] for r in self._all(self._db, "SELECT name FROM names ORDER BY id")]

    def series(self, name: str, after: int = 0) -> list[tuple[int, float | None]]:
        """One metric of the current timeline: (step, value) for steps beyond `after`."""
        return self._all(
            self._db,
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
            rows = self._all(
                self._db, DOWNSAMPLE_QUERY, {"name": name, "last": last, "width": width}
            )
            points: list[tuple[int, float | None]] = []
            for first, low, high in json.loads(rows[0][0]) if rows else ():
                if low is not None:
                    points += [(first, low), *([(first + 1, high)] if width > 1 else [])]
            if points:
                newest = self._all(self._db, NEWEST, {"name": name})[0]
                found[name] = [p for p in points if p[0] < newest[0]] + [newest]
        return found

    def past_series(self, name: str) -> list[tuple[int, int, float | None]]:
        """One metric of the timelines that were left: (attempt, step, value)."""
        return self._all(
            self._db,
            "SELECT attempt, step, value FROM metrics_past "
            "WHERE name = (SELECT id FROM names WHERE name = ?) ORDER BY attempt, step",
            (name,),
        )

    def metrics(self, last: int | None = None) -> list[Row]:
        """One row a step of the current timeline, every metric, None where undefined."""
        query = "SELECT step, attempt, time FROM steps ORDER BY step DESC LIMIT ?"
        steps = self._all(self._db, query, (limit(last),))
        names = dict.fromkeys(self.metric_names())  # after the steps: theirs are among them
        rows: dict[int, Row] = {}
        for step, attempt, time in reversed(steps):
            rows[step] = {"step": step, "attempt": attempt, "time": time} | names
        first = next(iter(rows), 0)
        for name, step, value in self._all(self._db, EVENTS_SINCE, (first,)):
            if step in rows:
                rows[step][name] = value
        return list(rows.values())

    def events(self, last: int | None = None, after: int = 0) -> list[Row]:
        """Events, oldest first; a command's with its whole life in one row."""
        rows = self._rows(
            self._db,
            "SELECT id AS event, time, attempt, step, kind, data FROM events WHERE id > ? "
            "ORDER BY id DESC LIMIT ?",
            (after, limit(last)),
        )
        commands = {c["id"]: c for c in self.commands()}
        for row in rows:
            row |= json.loads(row.pop("data"))
            if row["kind"] == "command" and row["id"] in commands:
                row |= commands[row["id"]]
        return rows[::-1]

    def commands(self) -> list[Row]:
        """Every command with its status and, once applied, what it changed."""
        rows = self._rows(
            self._db,
            "SELECT id, command, args, who, status, queued, accepted, ended, attempt, "
            "applied_step, reason, changes, result, live FROM commands ORDER BY queued",
        )
        for row in rows:
            row["args"] = json.loads(row["args"])
            row["changes"] = json.loads(row["changes"])
            row["result"] = json.loads(row["result"] or "{}")
            first = row["changes"][0] if row["changes"] else {}
            row["old"], row["new"] = first.get("old"), first.get("new")
        return rows

    def referred(self, prompt: str) -> Row | None:
        """What the reference answered to a prompt when somebody last probed with it.

        Returns:
            `response`, `score`, `kl` and `length` as the probe has them, and `step`, after which it
            was asked; None where nobody asked.
        """
        rows = self._all(self._db, REFERRED, (prompt,))
        if not rows or rows[0][0] is None:
            return None
        found: Row = json.loads(rows[0][0])
        return found | {"step": rows[0][1]}

    def telemetry(self, last: int | None = None) -> list[Telemetry]:
        """Readings of the machine, oldest first."""
        query = "SELECT data FROM telemetry ORDER BY time DESC LIMIT ?"
        rows = self._all(self._db, query, (limit(last),))
        return [msgspec.json.decode(r[0], type=Telemetry) for r in reversed(rows)]

    def checkpoints(self, statuses: tuple[str, ...] = ("complete", "superseded")) -> list[Row]:
        """Checkpoints, oldest first; by default all that are whole, earlier timelines' too."""
        rows = self._rows(self._db, "SELECT * FROM checkpoints ORDER BY step, attempt")
        return [row for row in rows if row["status"] in statuses]
