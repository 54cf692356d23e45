"""The journal as everybody else reads it: short reads, never a write.

Live, finished, crashed and archived sessions are read in the same way. Each method is one short
transaction, so that a reader never holds back the writer's checkpointing.
"""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine import schema
from engine.control import Telemetry
from engine.errors import JournalError
from engine.protocol import TokenArrays
from engine.session import LIVE_STATES, Session

Row = dict[str, Any]

SAMPLE_ORDERS = ("step", "score", "kl", "length")
SINCE = """
SELECT names.name, step, value FROM names CROSS JOIN metrics
WHERE metrics.name = names.id AND step >= ?
"""
"""One range of the index for each metric: the index begins with the name, so without the names in
front all of it would be read."""
# A range of the index for each span is quicker than grouping all rows; one array is one row.
OUTLINE = """
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


class SampleQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which samples, and in what order; None does not limit."""

    order: str = "step"
    """One of SAMPLE_ORDERS."""
    descending: bool = True
    text: str = ""
    """Stands in the prompt or the response, whatever the case."""
    score_from: float | None = None
    score_to: float | None = None
    kl_from: float | None = None
    kl_to: float | None = None
    cut_off: bool = False
    """Only answers that did not end by themselves."""


class Record:
    """What a session's journal says; a session that never began reads as empty."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._db = open_read_only(session.journal_file, len(schema.JOURNAL))
        self._samples = open_read_only(session.samples_file, len(schema.SAMPLES))

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for db in (self._db, self._samples):
            if db is not None:
                db.close()

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
            rows = self._all(self._db, OUTLINE, {"name": name, "last": last, "width": width})
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
        steps = self._all(self._db, query, (_limit(last),))
        names = dict.fromkeys(self.metric_names())  # after the steps: theirs are among them
        rows: dict[int, Row] = {}
        for step, attempt, time in reversed(steps):
            rows[step] = {"step": step, "attempt": attempt, "time": time} | names
        first = next(iter(rows), 0)
        for name, step, value in self._all(self._db, SINCE, (first,)):
            if step in rows:
                rows[step][name] = value
        return list(rows.values())

    def samples(self, last: int | None = None) -> list[Row]:
        """Samples of the current timeline, oldest first."""
        rows = self._rows(
            self._samples,
            "SELECT step, idx AS 'index', attempt, prompt, response, score, kl, length, ended, "
            "parts FROM samples ORDER BY step DESC, idx DESC LIMIT ?",
            (_limit(last),),
        )
        for row in rows:
            row["parts"] = json.loads(row["parts"])
            row["ended"] = bool(row["ended"])
        return rows[::-1]

    def sample_page(self, query: SampleQuery, limit: int, offset: int = 0) -> list[Row]:
        """A page of the current timeline's samples, as they are asked for."""
        # Column and direction come from fixed sets, never from what somebody typed.
        order = query.order if query.order in SAMPLE_ORDERS else "step"
        way = "DESC" if query.descending else "ASC"
        rows = self._rows(
            self._samples,
            "SELECT step, idx AS 'index', attempt, prompt, response, score, kl, length, ended, "  # noqa: S608
            "parts FROM samples WHERE (:text = '' OR instr(lower(prompt), lower(:text)) "
            "OR instr(lower(response), lower(:text))) "
            "AND (:score_from IS NULL OR score >= :score_from) "
            "AND (:score_to IS NULL OR score <= :score_to) "
            "AND (:kl_from IS NULL OR kl >= :kl_from) AND (:kl_to IS NULL OR kl <= :kl_to) "
            "AND (NOT :cut_off OR NOT ended) "
            f"ORDER BY {order} {way}, step DESC, idx LIMIT :limit OFFSET :offset",
            msgspec.structs.asdict(query) | {"limit": limit, "offset": offset},
        )
        for row in rows:
            row["parts"] = json.loads(row["parts"])
            row["ended"] = bool(row["ended"])
        return rows

    def arrays(self, step: int, index: int) -> TokenArrays | None:
        """The per-token arrays of one sample, where they were kept."""
        rows = self._all(
            self._samples, "SELECT data FROM arrays WHERE step = ? AND idx = ?", (step, index)
        )
        return msgspec.msgpack.decode(rows[0][0], type=TokenArrays) if rows else None

    def events(self, last: int | None = None, after: int = 0) -> list[Row]:
        """Events, oldest first; a command's with its whole life in one row."""
        rows = self._rows(
            self._db,
            "SELECT id AS event, time, attempt, step, kind, data FROM events WHERE id > ? "
            "ORDER BY id DESC LIMIT ?",
            (after, _limit(last)),
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

    def telemetry(self, last: int | None = None) -> list[Telemetry]:
        """Readings of the machine, oldest first."""
        query = "SELECT data FROM telemetry ORDER BY time DESC LIMIT ?"
        rows = self._all(self._db, query, (_limit(last),))
        return [msgspec.json.decode(r[0], type=Telemetry) for r in reversed(rows)]

    def checkpoints(self, statuses: tuple[str, ...] = ("complete", "superseded")) -> list[Row]:
        """Checkpoints, oldest first; by default all that are whole, earlier timelines' too."""
        rows = self._rows(self._db, "SELECT * FROM checkpoints ORDER BY step, attempt")
        return [row for row in rows if row["status"] in statuses]

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


def _limit(last: int | None) -> int:
    return -1 if last is None else last


def open_read_only(path: Path, newest: int) -> sqlite3.Connection | None:
    """Opens a database for reading; None where there is none, or none is finished yet."""
    if not path.is_file():
        return None
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        try:
            db = sqlite3.connect(uri, uri=True, timeout=5.0)
            version = schema.schema_version(db)
        except sqlite3.OperationalError:
            # An archived, read-only folder: WAL wants to make a file beside the database there.
            db = sqlite3.connect(uri + "&immutable=1", uri=True, timeout=5.0)
            version = schema.schema_version(db)
    except sqlite3.Error as error:
        raise JournalError(f"cannot read {path}: {error}") from error
    if version > newest:
        db.close()
        raise JournalError(f"{path} was written by a newer rlhf-tui; upgrade to read it")
    if version == 0:
        db.close()
        return None
    return db
