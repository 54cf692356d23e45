"""Sends alerts to operators outside the terminal: one class for each key of `notify`.

To add a channel, write a class of the :class:`Channel` protocol, add it to :data:`CHANNELS` and
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
"""Seconds for one alert, so that channels that hang do not accumulate."""


class Channel(Protocol):
    """A way to send alerts."""

    async def send(self, session: str, alert: Alert) -> None:
        """Sends one alert of a session.

        Implementations log errors and raise none, so that a failed message never ends a training.
        They return within :data:`TIMEOUT`.
        """


class CommandChannel:
    """`notify.command`: a shell command of the user."""

    def __init__(self, command: str) -> None:
        self._command = command

    async def send(self, session: str, alert: Alert) -> None:
        """Runs the command with the alert as JSON on its standard input.

        Its environment holds `RLHF_TUI_SESSION` and `RLHF_TUI_ALERT` (the text).
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
            # Unlike json, this encoder writes null for NaN and infinity.
            text = msgspec.json.encode(data)
            _, errors = await asyncio.wait_for(process.communicate(text), TIMEOUT)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.warning("notify.command took more than %.0f s and was killed", TIMEOUT)
            return
        if process.returncode:
            log.warning(
                "notify.command failed (%s): %s",
                process.returncode,
                errors.decode(errors="replace")[:500],
            )


CHANNELS: dict[str, Callable[[str], Channel]] = {"command": CommandChannel}
"""Key of `notify` → the channel's class; it is created with the key's value."""


def open_channels(config: NotifyConfig) -> list[Channel]:
    """Creates the channels that a configuration names."""
    return [kind(value) for key, kind in CHANNELS.items() if (value := getattr(config, key))]
