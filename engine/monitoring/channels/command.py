"""`notify.command`: a shell command of the user."""

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence

import msgspec

from engine.errors import shortened
from engine.monitoring.channels.message import Notification, NotificationError, one_line

MAX_LOGGED_OUTPUT = 500
"""Maximum number of bytes of a failed command's output that the log repeats."""
MAX_VARIABLE = 10_000
"""Characters of the text in the environment: Linux takes 128 KiB, and no NUL. The JSON has all."""
MAX_OUTPUT = 1 << 20
"""Maximum size of a command's error output in bytes, which is kept in memory."""


class CommandChannel:
    """Runs a command with the notification as JSON on its standard input.

    Its environment holds `RLHF_TUI_SESSION` and `RLHF_TUI_ALERT` (the text).
    """

    name = "notify.command"

    def __init__(self, command: str) -> None:
        self._command = command

    def missing_variables(self) -> list[str]:
        """Empty: it reads no variables."""
        return []

    async def send(self, message: Notification) -> None:
        """Runs the command. Raises NotificationError."""
        environment = os.environ | {
            "RLHF_TUI_SESSION": message.session,
            "RLHF_TUI_ALERT": shortened(message.text.replace("\0", " "), MAX_VARIABLE),
        }
        # Unlike json, this encoder writes null for NaN and infinity.
        text = msgspec.json.encode(message.as_json()) + b"\n"  # a file of them is JSON lines
        await run_program(["/bin/sh", "-c", self._command], text, environment)


async def run_program(
    arguments: Sequence[str], text: bytes, environment: Mapping[str, str] | None = None
) -> None:
    """Runs a program with an input, in its own process group, which is killed on cancellation.

    Its error output goes to memory, not to a pipe, which a process left behind would hold open.
    After :data:`MAX_OUTPUT` bytes its writes fail.

    Raises:
        NotificationError: it cannot be run, or it exits with a status other than 0.
    """
    errors = os.memfd_create("errors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(errors, MAX_OUTPUT)  # takes no memory yet
        fcntl.fcntl(errors, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            await process.communicate(text)
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
            raise
        if process.returncode:
            said = one_line(os.pread(errors, MAX_LOGGED_OUTPUT, 0).decode(errors="replace"))
            raise NotificationError(f"exit status {process.returncode}: {said}")
    except (OSError, ValueError) as error:
        raise NotificationError(f"it cannot be run: {error}") from error
    finally:
        os.close(errors)
