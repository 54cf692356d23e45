"""State and settings of a session at a moment of its history, from its events and commands."""

from typing import Any

import msgspec

from engine.config.settings import SettingChange
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.json_values import decoded
from engine.journal.rows import AttemptEvent, SessionMeta, StateEvent, decode_payload
from engine.metrics import BETA
from engine.session.position import Position

LAST_STATE = "SELECT data FROM events WHERE kind = 'state' ORDER BY id DESC LIMIT 1"
LAST_ATTEMPT = "SELECT data FROM events WHERE kind = 'attempt' ORDER BY id DESC LIMIT 1"
STEP_OF_ATTEMPT = "SELECT 1 FROM steps WHERE attempt = ? ORDER BY step DESC LIMIT 1"
FIRST_CHANGES = """
SELECT value FROM (
  SELECT e.value, row_number() OVER (
    PARTITION BY json_extract(e.value, '$.key') ORDER BY {order}, e.key
  ) AS number
  FROM main.commands c, json_each(c.changes) e WHERE c.status = 'applied'
) WHERE number = 1
"""
"""The first change of each setting, also one after the moment that a reader shows. SQLite looks for
it: a frame of a replay would take 0.1 ms for each command of the run."""
LAST_CHANGES = """
SELECT value FROM (
  SELECT e.value, row_number() OVER (
    PARTITION BY json_extract(e.value, '$.key')
    ORDER BY c.attempt DESC, coalesce(c.applied_step, 0) DESC, {order} DESC, e.key DESC
  ) AS number
  FROM commands c, json_each(c.changes) e
  WHERE c.status = 'applied' AND c.live AND coalesce(c.applied_step, 0) <= ?
) WHERE number = 1
"""
"""The change of each setting that is in effect in a step. After a crash, a command of an earlier
attempt is in effect again from its own step on. Of one step, the last one to arrive counts, not by
the wall clock, which may be set back."""
BETA_OF_STEP = """
SELECT value FROM main.metrics JOIN main.steps USING (step)
WHERE name = (SELECT id FROM names WHERE name = :name) AND step = :step AND attempt = :attempt
UNION ALL SELECT value FROM main.metrics_past
WHERE name = (SELECT id FROM names WHERE name = :name) AND step = :step AND attempt = :attempt
"""
"""Also of a step after the moment that a reader shows: what was in force when it began."""


def read_meta_at(database: ReadOnlyDatabase, position: Position, now: SessionMeta) -> SessionMeta:
    """Returns the session's state and settings as recorded at a moment.

    Args:
        database: the journal, with the views of that moment.
        position: the moment.
        now: what the supervisor recorded last.
    """
    states = database.rows(LAST_STATE)
    payload = decode_payload("state", states[0][0]) if states else None
    event = payload if isinstance(payload, StateEvent) else StateEvent("starting")
    if event.state == "starting" and database.rows(STEP_OF_ATTEMPT, (position.attempt,)):
        event = StateEvent("running")  # the event of that may be missing
    paused = event.state == "paused"
    attempts = database.rows(LAST_ATTEMPT)
    begun = decode_payload("attempt", attempts[0][0]) if attempts else None
    total_steps = begun.total_steps if isinstance(begun, AttemptEvent) else 0
    return msgspec.structs.replace(
        now,
        state=event.state,
        total_steps=total_steps or now.total_steps,
        settings=None if now.settings is None else _settings(database, position, now),
        message="" if paused else event.text,
        pause_reason=(event.text or None) if paused else None,
    )


def _settings(database: ReadOnlyDatabase, position: Position, now: SessionMeta) -> dict[str, Any]:
    """The settings in force: today's with all changes reverted, then reapplied up to the moment."""
    numbered = database.version >= schema.COMMANDS_ARE_NUMBERED
    applied = "c.applied_seq" if numbered else "c.ended, c.applied_step"
    arrived = "c.seq" if numbered else "c.queued"
    first = database.rows(FIRST_CHANGES.format(order=applied))
    last = database.rows(LAST_CHANGES.format(order=arrived), (position.step + 1,))
    settings = (now.settings or {}) | {change.key: change.old for change in _changes(first)}
    settings |= {change.key: change.new for change in _changes(last)}
    # The controller changes beta after each step, without a command.
    at = {"name": BETA, "step": position.step + 1, "attempt": position.attempt}
    betas = database.rows(BETA_OF_STEP, at)
    betas = betas or database.rows(BETA_OF_STEP, at | {"step": position.step})
    beta = betas[0][0] if betas else None
    return settings if beta is None else settings | {"beta": beta}


def _changes(rows: list[tuple[str]]) -> list[SettingChange]:
    return [decoded(row[0], SettingChange) for row in rows]
