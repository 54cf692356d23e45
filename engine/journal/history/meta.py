"""State and settings of a session at a moment of its history, from its events and commands."""

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.config.settings import SettingChange
from engine.journal.database import ReadOnlyDatabase
from engine.journal.json_values import decoded
from engine.journal.rows import CommandRow, SessionMeta, StateEvent, decode_payload
from engine.metrics import BETA
from engine.session.position import Position

LAST_STATE = "SELECT data FROM events WHERE kind = 'state' ORDER BY id DESC LIMIT 1"
STEP_OF_ATTEMPT = "SELECT 1 FROM steps WHERE attempt = ? ORDER BY step DESC LIMIT 1"
ALL_CHANGES = """
SELECT changes FROM main.commands WHERE status = 'applied' AND changes <> '[]'
ORDER BY ended, applied_step
"""
"""Of settings, also those after the moment that a reader shows."""
BETA_OF_STEP = """
SELECT value FROM main.metrics JOIN main.steps USING (step)
WHERE name = (SELECT id FROM names WHERE name = :name) AND step = :step AND attempt = :attempt
UNION ALL SELECT value FROM main.metrics_past
WHERE name = (SELECT id FROM names WHERE name = :name) AND step = :step AND attempt = :attempt
"""
"""Also of a step after the moment that a reader shows: what was in force when it began."""


def read_meta_at(
    database: ReadOnlyDatabase,
    position: Position,
    now: SessionMeta,
    commands: Sequence[CommandRow],
) -> SessionMeta:
    """Returns what the supervisor had recorded at a moment.

    Args:
        database: the journal, with the views of that moment.
        position: the moment.
        now: what the supervisor recorded last.
        commands: as they were at the moment.
    """
    states = database.rows(LAST_STATE)
    payload = decode_payload("state", states[0][0]) if states else None
    event = payload if isinstance(payload, StateEvent) else StateEvent("starting")
    if event.state == "starting" and database.rows(STEP_OF_ATTEMPT, (position.attempt,)):
        event = StateEvent("running")  # the event of that may be missing
    paused = event.state == "paused"
    return msgspec.structs.replace(
        now,
        state=event.state,
        settings=None if now.settings is None else _settings(database, position, now, commands),
        message="" if paused else event.text,
        pause_reason=(event.text or None) if paused else None,
    )


def _settings(
    database: ReadOnlyDatabase,
    position: Position,
    now: SessionMeta,
    commands: Sequence[CommandRow],
) -> dict[str, Any]:
    """The settings in force: those of today with all changes reverted, then changed again."""
    rows = database.rows(ALL_CHANGES)
    changes = [change for row in rows for change in decoded(row[0], list[SettingChange])]
    settings = (now.settings or {}) | {change.key: change.old for change in reversed(changes)}
    settings |= _changed_by(commands, position.step + 1)
    # The controller changes beta after each step, without a command.
    at = {"name": BETA, "step": position.step + 1, "attempt": position.attempt}
    betas = database.rows(BETA_OF_STEP, at)
    betas = betas or database.rows(BETA_OF_STEP, at | {"step": position.step})
    beta = betas[0][0] if betas else None
    return settings if beta is None else settings | {"beta": beta}


def _changed_by(commands: Sequence[CommandRow], step: int) -> dict[str, Any]:
    """The settings that commands had changed, with their values in a step.

    After a crash, a command of an earlier attempt is in effect again from its own step on.
    """
    applied = [
        c for c in commands if c.status == "applied" and c.live and (c.applied_step or 0) <= step
    ]
    applied.sort(key=lambda c: (c.attempt, c.applied_step or 0, c.ended or 0.0))
    return {change.key: change.new for command in applied for change in command.changes}
