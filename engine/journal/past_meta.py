"""State and settings of a session at a moment of its history, from its events and commands."""

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.config.settings import SettingChange
from engine.journal.rows import CommandRow, Payload, SessionMeta, StateEvent


def meta_at(
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
        now: what it recorded last.
        state: the last change of the state before the moment; None before the first.
        changes: all changes of settings, also those after the moment, in order.
        commands: as they were at the moment.
        beta: the KL coefficient of the step that follows the moment; None if unknown.
        steps: whether the attempt had completed a step.
    """
    event = state if isinstance(state, StateEvent) else StateEvent("starting")
    if event.state == "starting" and steps:
        event = StateEvent("running")  # the event of that may be missing
    paused = event.state == "paused"
    settings = None if now.settings is None else _settings_at(now.settings, changes, commands)
    if settings is not None and beta is not None:
        settings["beta"] = beta
    return msgspec.structs.replace(
        now,
        state=event.state,
        settings=settings,
        message="" if paused else event.text,
        pause_reason=(event.text or None) if paused else None,
    )


def _settings_at(
    now: dict[str, Any], changes: Sequence[SettingChange], commands: Sequence[CommandRow]
) -> dict[str, Any]:
    """The first value of each setting, and over it what commands in effect had changed."""
    settings = now | {change.key: change.old for change in reversed(changes)}
    applied = [c for c in commands if c.status == "applied" and c.live and c.changes]
    for command in sorted(applied, key=lambda c: (c.applied_step or 0, c.ended or 0.0)):
        settings |= {change.key: change.new for change in command.changes}
    return settings
