"""Commands and settings as short text."""

from typing import Any

from engine.journal.rows import CommandRow
from engine.protocol.commands import Rollback, Undo

GUARD_RAIL = "guard rail "
"""Begins the name of the sender of a guard rail's command; the name of its rule follows."""


def command_text(command: CommandRow) -> str:
    """Returns a command as text: `beta 0.05 → 0.08`, `pause`."""
    if command.changes:
        text = ", ".join(
            f"{c.key} {value_text(c.old)} → {value_text(c.new)}" for c in command.changes
        )
        return f"undo: {text}" if command.command == Undo.name() else text
    if command.command == Rollback.name():
        reseeded = ", new random seed" if command.args.get("reseed") else ""
        return f"roll back to step {command.args.get('step')}{reseeded}"
    given = " ".join(value_text(v) for v in command.args.values() if v not in (None, False))
    return f"{command.command} {given}".strip()


def value_text(value: Any) -> str:
    """Returns a setting's value as short text."""
    if value is None:
        return "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def sender(who: str) -> str:
    """Returns who sent a command, without terminal and address: `ana`, `guard rail`."""
    return GUARD_RAIL.strip() if who.startswith(GUARD_RAIL) else who.partition(" ")[0]
