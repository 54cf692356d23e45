"""Downsamples long curves of the journal to as many points as a chart can show."""

import json
from collections.abc import Iterable

from engine.journal.database import ReadOnlyDatabase

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


def downsampled(
    database: ReadOnlyDatabase, names: Iterable[str], *, table: str, last: int, spans: int
) -> dict[str, list[tuple[int, float | None]]]:
    """The minimum and the maximum of metrics in each span of steps.

    See :meth:`engine.journal.reader.JournalReader.downsampled`.

    Args:
        database: the journal.
        names: metrics of the current timeline.
        table: the table that holds them.
        last: the last step.
        spans: number of spans of equal length that the run is divided into.

    Returns:
        Metric → (step, value) with increasing steps. Metrics without values are omitted.
    """
    width = max(-(-last // spans), 1)
    query = DOWNSAMPLE_QUERY.format(table=table)
    curves = {}
    for name in names:
        rows = database.rows(query, {"name": name, "last": last, "width": width})
        points: list[tuple[int, float | None]] = []
        for first, low, high in json.loads(rows[0][0]) if rows else ():
            if low is not None:
                points += [(first, low), *([(first + 1, high)] if width > 1 and first else [])]
        # Between two reads an attempt may have taken all of them off the timeline.
        if points and (newest := database.rows(NEWEST_VALUE, {"name": name})):
            curves[name] = [p for p in points if p[0] < newest[0][0]] + newest
    return curves


def cumulated(
    database: ReadOnlyDatabase, name: str, *, last: int, spans: int, summed: bool
) -> list[tuple[int, float]]:
    """The cumulated value of a metric at one step in each span; see `JournalReader.cumulated`.

    Args:
        database: the journal.
        name: a metric of the current timeline that never decreases, or that `summed` adds up.
        last: the last step.
        spans: number of spans of equal length that the run is divided into.
        summed: returns the sum over all steps up to each.
    """
    query = CUMULATED_SUM if summed else CUMULATED
    return database.rows(query, {"name": name, "width": max(-(-last // spans), 1)})
