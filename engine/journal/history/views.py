"""Temporary views that limit a session's databases to what they held at a moment of its history.

A temporary view hides the table of the same name, so every query of the readers returns what it
would have returned then. Nothing is written to the files. Steps that later attempts abandoned
belonged to the timeline then, and are in the tables named `*_past` today.

The journal does not record when a checkpoint was removed: a removed one is shown until
`train.keep_last` later ones were saved.
"""

import functools
from collections.abc import Callable, Iterable

from engine.journal import schema
from engine.journal.database import Views
from engine.session.folder import SessionFolder
from engine.session.position import Position, StepRange


def views_of(session: SessionFolder, of: Callable[[Position, int], list[str]]) -> Views | None:
    """The views over one of a session's files; None for a session that is not in the past."""
    position = session.position
    return None if position is None else functools.partial(of, position)


def journal_views(position: Position, version: int) -> list[str]:
    """The statements that create the views over journal.db; `version` is its schema version."""
    at, attempt = position.time, position.attempt
    numbers = ", seq, applied_seq" if version >= schema.COMMANDS_ARE_NUMBERED else ""
    kept = ", kept" if version >= schema.CHECKPOINTS_ARE_KEPT else ""
    return [
        *_timeline_views(position, "steps", "steps_past", "attempt, step, time"),
        *_timeline_views(position, "metrics", "metrics_past", "name, step, value", "attempt"),
        _view("events", f"SELECT * FROM main.events WHERE id <= {position.event}"),
        _view("telemetry", f"SELECT * FROM main.telemetry WHERE time <= {at!r}"),
        _view(
            "attempts",
            f"""
            SELECT attempt, from_step, fresh, started,
                iif(attempt < {attempt} OR ended <= {at!r}, ended, NULL) AS ended,
                pid, host, version
            FROM main.attempts WHERE attempt <= {attempt}
            """,
        ),
        _view(
            "checkpoints",
            f"""
            SELECT step, attempt, time, size, score, kl,
                {_checkpoint_status(position, "AND NOT n.kept" if kept else "")} AS status{kept}
            FROM main.checkpoints c WHERE time <= {at!r} OR attempt < {attempt}
            """,
        ),
        # A command that was overridden later was live until then. CASE, because OR evaluates both
        # sides, and `_overridden` reads all commands.
        _view(
            "commands",
            f"""
            SELECT id, command, args, who,
                CASE
                    WHEN had_ended THEN status
                    WHEN accepted <= {at!r} THEN 'accepted'
                    ELSE 'queued'
                END AS status,
                queued,
                iif(accepted <= {at!r} OR had_ended, accepted, NULL) AS accepted,
                iif(had_ended, ended, NULL) AS ended,
                iif(had_ended, applied_step, NULL) AS applied_step,
                iif(had_ended, reason, NULL) AS reason,
                iif(had_ended, result, NULL) AS result,
                attempt,
                iif(had_ended, changes, '[]') AS changes,
                CASE WHEN live THEN 1 ELSE NOT (
                    {_attempt_before("c.applied_step", position, "AND b.fresh")}
                    OR {_overridden(position)}
                ) END AS live{numbers}
            FROM (SELECT *, {_ended("o", position)} AS had_ended FROM main.commands o) c
            WHERE queued <= {at!r} OR attempt < {attempt}
            """,
        ),
    ]


def sample_views(position: Position, version: int) -> list[str]:
    """The statements that create the views over samples.db."""
    tables = ["samples"] + ["evaluated"] * (version >= schema.EVALUATED_ARE_KEPT)
    columns = schema.sample_columns(version)
    views = [
        view
        for table in tables
        for view in _timeline_views(position, table, f"{table}_past", columns)
    ]
    # Token values are kept for samples of today's timeline only.
    kept = f"SELECT * FROM main.arrays WHERE step <= {position.kept}"
    return [*views, _view("arrays", kept)]


def label_views(position: Position, version: int) -> list[str]:
    """The statements that create the views over labels.db."""
    until = f"WHERE time <= {position.time!r}"
    return [
        _view(table, f"SELECT * FROM main.{table} {until}")
        for table in ("judgements", "preferences")
    ]


def _timeline_views(
    position: Position, table: str, past: str, columns: str, of_past: str = ""
) -> list[str]:
    """Two views: rows of the timeline of that moment, and rows that were abandoned by then.

    Args:
        position: the moment.
        table: the table with the rows of today's timeline.
        past: the table with the rows that are on an abandoned branch today.
        columns: the columns of `table`.
        of_past: a column that only `past` has.
    """
    timeline = f"SELECT {columns} FROM main.{table} WHERE step <= {position.kept}"
    if position.current:
        timeline += f" UNION ALL {_in_ranges(past, columns, position.current)}"
    with_attempt = f"{columns}, {of_past}" if of_past else columns
    return [
        _view(table, timeline),
        _view(past, _in_ranges(past, with_attempt, position.abandoned)),
    ]


def _in_ranges(table: str, columns: str, ranges: Iterable[StepRange]) -> str:
    rows = ", ".join(f"({r.attempt}, {r.after}, {r.until})" for r in ranges)
    chosen = ", ".join(f"p.{name.strip()}" for name in columns.split(","))
    if not rows:
        return f"SELECT {chosen} FROM main.{table} p WHERE 0"
    # In this order, each range is looked up in the index.
    return f"""
        SELECT {chosen} FROM (VALUES {rows}) r CROSS JOIN main.{table} p
        WHERE p.attempt = r.column1 AND p.step > r.column2 AND p.step <= r.column3
    """


def _checkpoint_status(position: Position, counted: str) -> str:
    """SQL: the status of a checkpoint c by then.

    Args:
        position: the moment.
        counted: SQL that restricts which checkpoints `n` count in `train.keep_last`.
    """
    by_then = f"FROM main.checkpoints n WHERE n.time <= {position.time!r}"
    return f"""
        CASE
            WHEN status IN ('written', 'abandoned') THEN status
            WHEN status = 'removed'
                AND EXISTS (
                    SELECT 1 {by_then} AND n.step > c.step AND n.attempt >= c.attempt
                    {counted} LIMIT 1 OFFSET {position.keep_last - 1}
                )
                THEN status
            WHEN status = 'replaced'
                AND EXISTS (SELECT 1 {by_then} AND n.step = c.step AND n.attempt > c.attempt)
                THEN status
            WHEN {_attempt_before("c.step", position)} THEN 'superseded'
            ELSE 'complete'
        END
    """


def _ended(row: str, position: Position) -> str:
    """SQL: whether a command, the row named `row`, was applied or rejected by then."""
    attempt = position.attempt
    return f"""(
        {row}.ended <= {position.time!r} OR {row}.attempt < {attempt}
        OR ({row}.attempt = {attempt} AND {row}.applied_step <= {position.step})
    )"""


def _attempt_before(step: str, position: Position, condition: str = "") -> str:
    """SQL: whether, by then, an attempt later than that of row c had begun before a step of c.

    Args:
        step: an SQL expression.
        position: the moment.
        condition: SQL that restricts which attempts `b` count.
    """
    return f"""EXISTS (
        SELECT 1 FROM main.attempts b
        WHERE b.attempt > c.attempt AND b.attempt <= {position.attempt}
            AND b.from_step < {step} {condition}
    )"""


def _overridden(position: Position) -> str:
    """SQL: whether a later attempt had changed a setting of command c before c was repeated."""
    return f"""EXISTS (
        SELECT 1
        FROM main.commands o, json_each(o.changes) new, json_each(c.changes) old
        WHERE o.attempt > c.attempt AND o.applied_step <= c.applied_step
            AND {_ended("o", position)}
            AND json_extract(new.value, '$.key') = json_extract(old.value, '$.key')
    )"""


def _view(name: str, query: str) -> str:
    return f"CREATE TEMP VIEW {name} AS {query}"
