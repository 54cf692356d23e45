"""State and settings of a session at a moment of its history, from its events and commands."""

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.config.settings import SettingChange
from engine.journal.rows import CommandRow, Payload, SessionMeta, StateEvent
from engine.session.position import Position


def meta_at(
    position: Position,
    now: SessionMeta,
    state: Payload | None,
    changes: Sequence[SettingChange],
    commands: Sequence[CommandRow],
    beta: float | None,
    *,
    steps: bool,
) -> SessionMeta:
    """Returns what the supervisor had recorded at a moment.

    Args:
        position: the moment.
        now: what the supervisor recorded last.
        state: the last change of the state before the moment; None before the first.
        changes: all changes of settings, also those after the moment, in order.
        commands: as they were at the moment, in order of arrival.
        beta: the KL coefficient of the step that follows the moment; None if unknown.
        steps: whether the attempt had completed a step.
    """
    event = state if isinstance(state, StateEvent) else StateEvent("starting")
    if event.state == "starting" and steps:
        event = StateEvent("running")  # the event of that may be missing
    paused = event.state == "paused"
    settings = None
    if now.settings is not None:
        first = now.settings | {change.key: change.old for change in reversed(changes)}
        settings = first | _changed_by(commands, position.step + 1)
        settings |= {} if beta is None else {"beta": beta}
    return msgspec.structs.replace(
        now,
        state=event.state,
        settings=settings,
        message="" if paused else event.text,
        pause_reason=(event.text or None) if paused else None,
    )


def _changed_by(commands: Sequence[CommandRow], step: int) -> dict[str, Any]:
    """The settings that commands had changed, with their values in a step.

    After a crash, a command of an earlier attempt is in effect again from its own step on.
    """
    applied = [
        c for c in commands if c.status == "applied" and c.live and (c.applied_step or 0) <= step
    ]
    # Of one step, in the order of arrival, not by the wall clock, which may be set back.
    applied.sort(key=lambda c: (c.attempt, c.applied_step or 0))
    return {change.key: change.new for command in applied for change in command.changes}
