"""`notify.command`: a shell command of the user."""

import asyncio
import contextlib
import os
import signal

import msgspec

from engine.monitoring.channels.message import Notification, NotificationError, one_line

LONGEST_OUTPUT = 500
"""Characters of what a failed command printed that the log repeats."""


class CommandChannel:
    """Runs a command with the notification as JSON on its standard input.

    Its environment holds `RLHF_TUI_SESSION` and `RLHF_TUI_ALERT` (the text).
    """

    name = "notify.command"

    def __init__(self, command: str) -> None:
        self._command = command

    async def send(self, message: Notification) -> None:
        """Runs the command; kills its process group if it is cancelled.

        Raises:
            NotificationError: the command cannot be run or fails.
        """
        environment = os.environ | {
            "RLHF_TUI_SESSION": message.session,
            "RLHF_TUI_ALERT": message.text,
        }
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
            raise NotificationError(f"it cannot be run: {error}") from error
        # Unlike json, this encoder writes null for NaN and infinity.
        await finish(process, msgspec.json.encode(message.as_json()))


async def finish(process: asyncio.subprocess.Process, text: bytes) -> None:
    """Gives a process its input and waits for its end; kills its group if that is cancelled.

    Raises:
        NotificationError: it ends with another status than 0.
    """
    try:
        _, errors = await process.communicate(text)
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if process.returncode:
        said = one_line(errors.decode(errors="replace"))[:LONGEST_OUTPUT]
        raise NotificationError(f"exit status {process.returncode}: {said}")
