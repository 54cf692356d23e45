"""Whether a command can be carried out now; a refusal says why."""

from typing import Any

import msgspec

from engine.config.settings import Settings
from engine.errors import CommandRejectedError
from engine.launch.start import timeline_checkpoints
from engine.protocol.commands import (
    AnyCommand,
    Note,
    Pause,
    Probe,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    Unpause,
    new_values,
)
from engine.session.folder import Session

MAX_TEXT = 10_000
"""Characters in a note or a probe."""


def check_command(
    command: AnyCommand,
    state: str,
    settings: dict[str, Any],
    session: Session,
    *,
    paused: bool,
    batch: int = 0,
) -> None:
    """What can be told without asking a rank.

    Args:
        command: the command.
        state: the session's.
        settings: in force.
        session: whose checkpoints there are to go back to.
        paused: whether the run is.
        batch: `rollout.batch_size` of the engine that is asked; a changed horizon is held to it.

    Raises:
        CommandRejectedError: says what is wrong with it, or with the moment.
        JournalError: the session cannot be read.
    """
    if isinstance(command, Note | Probe) and not 0 < len(command.text.strip()) <= MAX_TEXT:
        raise CommandRejectedError(f"the text must have 1 to {MAX_TEXT} characters")
    if isinstance(command, Note):
        return
    ending = state == "stopping"
    match command:
        case Stop(now=now) if ending and not now:
            raise CommandRejectedError("the run is stopping already")
        case Stop():
            return
        case _ if ending:
            raise CommandRejectedError("the run is stopping; resume it first")
        case Pause() if paused or state == "pausing":
            raise CommandRejectedError("the run is paused already")
        case Unpause() if not paused and state != "pausing":
            raise CommandRejectedError("the run is not paused")
        case SetBeta() | SetKLController() | SetSetting():
            values = new_values(command, msgspec.convert(settings, Settings, strict=False))
            _check_horizon(settings | values, batch)
        case Rollback(step=step):
            _check_rollback(step, session)
        case _:
            return


def _check_horizon(settings: dict[str, Any], batch: int) -> None:
    """As the configuration is held to it: one step may not take beta to zero or below."""
    least = 0.2 * batch
    if settings["controller"] == "adaptive" and settings["horizon"] <= least:
        raise CommandRejectedError(
            f"horizon ({settings['horizon']:g}) must exceed {least:g}, a fifth of the batch"
        )


def _check_rollback(step: int, session: Session) -> None:
    steps = timeline_checkpoints(session)
    if step not in steps:
        have = ", ".join(map(str, steps)) if steps else "none yet"
        raise CommandRejectedError(f"there is no checkpoint of step {step} (there is: {have})")
