"""Takes alerts out of the terminal: one class for each channel, found by its `notify.*` key.

To add one, write a class of the :class:`Channel` protocol, enter it in :data:`CHANNELS`, and
declare its key in :class:`engine.config.schema.NotifyConfig`.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.config.schema import NotifyConfig
from engine.monitoring.guardrails import Alert

log = logging.getLogger("engine")

TIMEOUT = 30.0
"""Seconds; a message that hangs must not pile up."""


class Channel(Protocol):
    """One way to an operator."""

    async def send(self, session: str, alert: Alert) -> None:
        """Sends one alert of a session.

        It raises nothing: what goes wrong is logged, a message that cannot be sent must not end a
        training. It returns within :data:`TIMEOUT`.
        """


class CommandChannel:
    """`notify.command`: the user's own shell command."""

    def __init__(self, command: str) -> None:
        self._command = command

    async def send(self, session: str, alert: Alert) -> None:
        """Runs the command with the alert as JSON on its standard input.

        `RLHF_TUI_SESSION` and `RLHF_TUI_ALERT` (the sentence) are in its environment.
        """
        data = alert.as_data() | {"session": session, "step": alert.step}
        environment = os.environ | {"RLHF_TUI_SESSION": session, "RLHF_TUI_ALERT": alert.text}
        try:
            process = await asyncio.create_subprocess_shell(
                self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            log.warning("notify.command cannot be run: %s", error)
            return
        try:
            # Unlike json's, this encoder writes null for what is not finite.
            text = msgspec.json.encode(data)
            _, errors = await asyncio.wait_for(process.communicate(text), TIMEOUT)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.warning("notify.command took more than %.0f s: ended", TIMEOUT)
            return
        if process.returncode:
            log.warning(
                "notify.command failed (%s): %s",
                process.returncode,
                errors.decode(errors="replace")[:500],
            )


CHANNELS: dict[str, Callable[[str], Channel]] = {"command": CommandChannel}
"""Key of `notify` → the channel, made from the key's value."""


def open_channels(config: NotifyConfig) -> list[Channel]:
    """The channels that a configuration names."""
    return [make(value) for key, make in CHANNELS.items() if (value := getattr(config, key))]
