"""Takes an alert out of the terminal, by the user's own command."""

import asyncio
import contextlib
import logging
import os
import signal

import msgspec

from engine.monitoring.guardrails import Alert

log = logging.getLogger("engine")

TIMEOUT = 30.0
"""Seconds; a command that hangs must not pile up."""


async def notify(command: str, session: str, alert: Alert) -> None:
    """Runs the command with the alert as JSON on its standard input.

    `RLHF_TUI_SESSION` and `RLHF_TUI_ALERT` (the sentence) are in its environment. What goes wrong
    is logged: a message that cannot be sent must not end a training.
    """
    data = alert.as_data() | {"session": session, "step": alert.step}
    environment = os.environ | {"RLHF_TUI_SESSION": session, "RLHF_TUI_ALERT": alert.text}
    try:
        process = await asyncio.create_subprocess_shell(
            command,
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
        log.warning("notify.command failed (%s): %s", process.returncode, errors.decode()[:500])
