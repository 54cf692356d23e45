"""What an operator can ask of a running engine: one frozen struct a command.

A command's life is kept in the journal: `queued → accepted → applied at step S`, or
`rejected: reason`. Each works while paused.
"""

from typing import Any, Literal

import msgspec
from msgspec import Struct

from engine.config.settings import Settings, check_settings, setting_name
from engine.errors import CommandRejectedError


class Command(Struct, frozen=True, kw_only=True, tag_field="command", forbid_unknown_fields=True):
    """Anything that can be asked."""


class Pause(Command, frozen=True, tag="pause"):
    """Hold at the next step boundary."""


class Unpause(Command, frozen=True, tag="unpause"):
    """Go on."""


class Stop(Command, frozen=True, tag="stop"):
    """End the run: after the step in hand, saved; with `now` at once, unsaved."""

    now: bool = False


class Checkpoint(Command, frozen=True, tag="checkpoint"):
    """Save at the next step boundary."""


class SetBeta(Command, frozen=True, tag="beta"):
    """Set the KL coefficient; an adaptive controller goes on from it."""

    value: float


class SetKLController(Command, frozen=True, tag="kl"):
    """Choose the KL controller and what it aims at; what is None stays as it is."""

    controller: Literal["fixed", "adaptive"]
    target: float | None = None
    horizon: float | None = None
    beta_min: float | None = None
    beta_max: float | None = None


class SetSetting(Command, frozen=True, tag="set"):
    """Change one setting, by its own name or its configuration key."""

    key: str
    value: Any


class Undo(Command, frozen=True, tag="undo"):
    """Take back the last change of a setting that an operator made."""


class Rollback(Command, frozen=True, tag="rollback"):
    """Go back to a checkpoint in place: a new attempt from there."""

    step: int
    reseed: bool = False


class Probe(Command, frozen=True, tag="probe"):
    """Answer a prompt with the current policy and with the reference."""

    text: str


class Note(Command, frozen=True, tag="note"):
    """A line in the ledger."""

    text: str


AnyCommand = (
    Pause
    | Unpause
    | Stop
    | Checkpoint
    | SetBeta
    | SetKLController
    | SetSetting
    | Undo
    | Rollback
    | Probe
    | Note
)


def new_values(
    command: SetBeta | SetKLController | SetSetting, settings: Settings
) -> dict[str, Any]:
    """What a command that changes settings changes them to, checked against what it may be.

    Raises:
        CommandRejectedError: an unknown setting, a wrong type or a value out of range.
    """
    match command:
        case SetBeta(value=value):
            values: dict[str, Any] = {"beta": value}
        case SetKLController():
            given = msgspec.structs.asdict(command)
            values = {k: v for k, v in given.items() if v is not None}
        case SetSetting(key=key, value=value):
            values = {setting_name(key): value}
    return check_settings(settings, values)


def command_name(command: Command) -> str:
    """The word it is known by: `pause`, `beta`."""
    tag = type(command).__struct_config__.tag
    if not isinstance(tag, str):
        raise CommandRejectedError(f"{type(command).__name__} is no command")
    return tag
