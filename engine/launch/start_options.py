"""The start of an attempt, and how an engine's process receives it."""

import os
from typing import Any

import msgspec

from engine.config.settings import SettingChange
from engine.examined import examined

START_VARIABLE = "RLHF_TUI_START"


class StartOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The start of an attempt."""

    from_step: int = 0
    """The checkpoint's step; 0 starts from the configuration's models."""
    fresh: bool = False
    """Discard the settings changed after that step (--from, fork, roll back)."""
    reseed: bool = False
    """Sample with other random numbers than the previous attempt from that step."""
    after_attempt: int | None = None
    """For a resume: the session's last attempt when the checkpoint and the changes were chosen.
    These are stale if another engine has begun an attempt since; None is not checked."""
    overrides: list[str] = []
    """`key=value`, applied to config.yaml."""
    changes: list[SettingChange] = []
    """The overrides of live settings, in force from the next step on."""
    who: str = ""
    """The operator, for the journal."""
    origin: dict[str, Any] = {}
    """For a fork: `from` (the parent session's name), `step`, and `ema` if it begins with the
    averaged policy."""


def start_variable(start: StartOptions) -> dict[str, str]:
    """The environment variable that passes its :class:`StartOptions` to an engine's process.

    An override may hold a secret, and a command line is visible to every user.
    """
    return {START_VARIABLE: msgspec.json.encode(start).decode()}


def received_start() -> StartOptions:
    """Reads the start and removes it from this process's environment, which the ranks inherit."""
    return msgspec.json.decode(os.environ.pop(START_VARIABLE), type=examined(StartOptions))
