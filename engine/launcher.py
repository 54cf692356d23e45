"""Starts the ranks, and ends them with everything they started."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from pathlib import Path

from engine.config import LaunchConfig
from engine.protocol import NICE_VARIABLE, SOCKET_VARIABLE, TOKEN_VARIABLE
from engine.session import Session


class Ranks:
    """The processes of one attempt."""

    def __init__(self, session: Session, socket_path: Path, launch: LaunchConfig) -> None:
        self._launch = launch
        self._session = session
        self._socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None
        self.token = ""
        """What a rank must say to be taken for one of these; new at each start."""

    async def start(self) -> None:
        """Starts them in a session of their own; what they print goes into engine.log.

        The session's folder stands in the command line, so that `ps` shows whose they are.
        """
        self.token = secrets.token_hex(16)
        # Threads that wait by spinning cost 3 to 6 times the step on a machine that does anything
        # else, the TUI included; threads that sleep cost nothing measurable on an idle one.
        environment = (
            {"OMP_WAIT_POLICY": "PASSIVE"}
            | os.environ
            | {
                TOKEN_VARIABLE: self.token,
                SOCKET_VARIABLE: str(self._socket_path),
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
                NICE_VARIABLE: str(self._launch.nice),
            }
        )
        if self._launch.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._launch.gpus))
        command = [sys.executable, "-m", "engine.train.worker", str(self._session.folder)]
        with self._session.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Until they have ended; the exit status, negative for a signal's number."""
        if self._process is None:
            return 0
        status = await self._process.wait()
        self._end_group(self._process.pid)  # what they had started may have outlived them
        return status

    def kill(self) -> None:
        """Ends them at once, with every process of their group."""
        process = self._process
        if process is not None and process.returncode is None:
            self._end_group(process.pid)

    @staticmethod
    def _end_group(leader: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (the kernel does this when memory runs out)" if status == -signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended with status {status}"
