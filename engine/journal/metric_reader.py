"""Reads the metrics of a journal: curves, rows of a step, and long curves downsampled."""

import json
import math
from array import array
from collections.abc import Collection, Iterable, Iterator

from engine.journal.database import ReadOnlyDatabase, limit
from engine.journal.rows import MetricRow
from engine.session.folder import SessionFolder
from engine.session.position import NO_LIMIT

DOWNSAMPLE_QUERY = """
WITH RECURSIVE spans(first, size) AS (
    SELECT 0, 1 UNION ALL SELECT first + size, :width FROM spans WHERE first + size <= :last
)
SELECT json_group_array(json(
    (SELECT json_array(spans.first, min(value), max(value)) FROM {table}
     WHERE name = (SELECT id FROM names WHERE name = :name)
     AND step >= spans.first AND step < min(spans.first + spans.size, :last + 1))
)) FROM spans
"""
"""Minimum and maximum per span of steps, as one JSON array; step 0, which only evaluations have,
is a span of its own. Reading one range of the index per span
is faster than grouping all rows."""
NEWEST_VALUE = """
SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = :name)
AND value IS NOT NULL ORDER BY step DESC LIMIT 1
"""
CUMULATED = """
SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = :name)
AND value IS NOT NULL AND (step % :width = 0 OR step = (SELECT max(step) FROM steps))
ORDER BY step
"""
CUMULATED_SUM = """
SELECT step, total FROM (
    SELECT step, sum(value) OVER (ORDER BY step) AS total FROM metrics
    WHERE name = (SELECT id FROM names WHERE name = :name)
) WHERE step % :width = 0 OR step = (SELECT max(step) FROM steps) ORDER BY step
"""
VALUE_AT = """
SELECT value FROM metrics WHERE name = (SELECT id FROM names WHERE name = :name) AND step = :step
"""


class MetricReader:
    """Reads metrics of the current timeline, unless a method says otherwise."""

    def __init__(self, session: SessionFolder, database: ReadOnlyDatabase) -> None:
        """`database`: the journal of `session`, which is not closed."""
        self._session = session
        self._db = database

    def names(self) -> list[str]:
        """The names of all metrics in the journal."""
        return [r[0] for r in self._db.rows("SELECT name FROM names ORDER BY id")]

    def series(
        self, name: str, after: int = -1, until: int | None = None
    ) -> list[tuple[int, float | None]]:
        """One metric of the current timeline, as (step, value) for the steps in (after, until].

        Step 0 has the metrics of an evaluation before the first step.
        """
        return self._db.rows(
            "SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = ?) "
            "AND step > ? AND step <= ? ORDER BY step",
            (name, after, NO_LIMIT if until is None else until),
        )

    def last_finite(self, name: str, count: int, after: int, until: int) -> list[tuple[int, float]]:
        """The last `count` finite values of a metric, as :meth:`series` returns them."""
        rows = self._db.rows(
            "SELECT step, value FROM metrics WHERE name = (SELECT id FROM names WHERE name = ?) "
            "AND step > ? AND step <= ? AND value IS NOT NULL ORDER BY step DESC LIMIT ?",
            (name, after, until, count),
        )
        return rows[::-1]

    def downsampled(
        self, names: Iterable[str], spans: int
    ) -> dict[str, list[tuple[int, float | None]]]:
        """Downsamples long curves to the minimum and the maximum of each span of steps.

        Takes a tenth of the time of :meth:`series`. SQLite returns a single row, so a thread does
        not wait for the GIL between rows. The last point is the newest value; the other values are
        rounded to the 15 digits of SQLite's JSON.

        Args:
            names: metrics of the current timeline.
            spans: number of spans of equal length that the run is divided into.

        Returns:
            Metric → (step, value) with increasing steps. Metrics without values are omitted.
        """
        position, last = self._session.position, last_step(self._session, self._db)
        width = _width(last, spans)
        # The view that hides later steps would give SQLite a second bound, of which it uses one.
        table = "main.metrics" if position is not None and not position.current else "metrics"
        query = DOWNSAMPLE_QUERY.format(table=table)
        curves = {}
        for name in names:
            rows = self._db.rows(query, {"name": name, "last": last, "width": width})
            points: list[tuple[int, float | None]] = []
            for first, low, high in json.loads(rows[0][0]) if rows else ():
                if low is not None:
                    points += [(first, low), *([(first + 1, high)] if width > 1 and first else [])]
            # Between two reads an attempt may have taken all of them off the timeline.
            if points and (newest := self.newest_value(name)) is not None:
                curves[name] = [*(p for p in points if p[0] < newest[0]), newest]
        return curves

    def cumulated(self, name: str, spans: int, *, summed: bool) -> list[tuple[int, float]]:
        """The cumulated value of a metric at one step in each span of steps, and at the last step.

        Args:
            name: a metric of the current timeline that never decreases, or that `summed` adds up.
            spans: number of spans of equal length that the run is divided into.
            summed: returns the sum over all steps up to each.
        """
        query = CUMULATED_SUM if summed else CUMULATED
        width = _width(last_step(self._session, self._db), spans)
        return self._db.rows(query, {"name": name, "width": width})

    def value_at(self, name: str, step: int) -> float | None:
        """The value of a metric at a step; None where it is undefined."""
        value: float | None = self._db.value(VALUE_AT, {"name": name, "step": step})
        return value

    def last_row(self, names: Iterable[str]) -> MetricRow | None:
        """The last row of the current timeline, with these metrics only; None before the first."""
        rows = self._db.rows("SELECT step, attempt, time FROM steps ORDER BY step DESC LIMIT 1")
        if not rows:
            return None
        step, attempt, time = rows[0]
        values = {n: self.value_at(n, step) for n in names}
        return MetricRow(step=step, attempt=attempt, time=time, values=values)

    def newest_value(self, name: str) -> tuple[int, float] | None:
        """The last step of the current timeline at which a metric has a value, and the value."""
        rows = self._db.rows(NEWEST_VALUE, {"name": name})
        return rows[0] if rows else None

    def past_series(self, name: str) -> list[tuple[int, int, float | None]]:
        """One metric of the abandoned branches, as (attempt, step, value)."""
        return self._db.rows(
            "SELECT attempt, step, value FROM metrics_past "
            "WHERE name = (SELECT id FROM names WHERE name = ?) ORDER BY attempt, step",
            (name,),
        )

    def rows(self, last: int | None = None, only: Collection[str] | None = None) -> list[MetricRow]:
        """The rows of :meth:`iter_rows`."""
        return list(self.iter_rows(last, only))

    def iter_rows(
        self, last: int | None = None, only: Collection[str] | None = None
    ) -> Iterator[MetricRow]:
        """One row per step of the current timeline, oldest first.

        The evaluation before the first step is a row of step 0. All values are read at once, as
        numbers of eight bytes; a row takes far more memory and is made when it is asked for.

        Args:
            last: maximum number of rows, the last ones; None for all.
            only: names of the metrics to read; None for all.
        """
        query = "SELECT step, attempt, time FROM steps ORDER BY step DESC LIMIT ?"
        steps = self._db.rows(query, (limit(last),))
        # Read after the steps, so it has all of their names.
        names = [n for n in self.names() if only is None or n in only]
        if last is None or len(steps) < last:
            steps += self._before_first_step()
        steps.reverse()
        place = {step: i for i, (step, _, _) in enumerate(steps)}
        columns = {name: array("d", [math.nan]) * len(steps) for name in names}
        for name, column in columns.items():
            for step, value in self.series(name, after=steps[0][0] - 1 if steps else 0):
                if value is not None and step in place:
                    column[place[step]] = value
        return (
            MetricRow(
                step=step,
                attempt=attempt,
                time=time,
                values={n: None if math.isnan(c[i]) else c[i] for n, c in columns.items()},
            )
            for i, (step, attempt, time) in enumerate(steps)
        )

    def _before_first_step(self) -> list[tuple[int, int, None]]:
        """Step 0, as in the table `steps`, if it has metrics: the evaluation before the first."""
        attempt = self._db.value(
            "SELECT max(attempt) FROM attempts WHERE from_step = 0 AND EXISTS "
            "(SELECT 1 FROM names CROSS JOIN metrics WHERE metrics.name = names.id AND step = 0)"
        )
        return [] if attempt is None else [(0, attempt, None)]


def last_step(session: SessionFolder, database: ReadOnlyDatabase) -> int:
    """The last completed step of a session, 0 before the first; `database`: its journal."""
    if session.position is not None:
        return session.position.step
    return database.value("SELECT max(step) FROM steps") or 0


def _width(last: int, spans: int) -> int:
    """The steps of each of as many spans, the last one up to a step."""
    return max(-(-last // spans), 1)
