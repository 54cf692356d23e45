"""Starts the ranks, and ends them with everything they started."""

import asyncio
import contextlib
import os
import secrets
import signal
import tempfile
from pathlib import Path

from engine.config.schema import LaunchConfig
from engine.launch.environment import (
    SOCKET_VARIABLE,
    STORE_VARIABLE,
    TOKEN_VARIABLE,
    rank_command,
    rank_environment,
    ranks_per_node,
)
from engine.session.folder import Session


class RankProcesses:
    """The processes of one attempt: a rank alone, or torchrun's agent with several."""

    def __init__(self, session: Session, socket_path: Path, launch: LaunchConfig) -> None:
        self._launch = launch
        self._session = session
        self._socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self.count = ranks_per_node(launch)
        """Ranks on this machine."""
        self.pids: dict[int, int] = {}
        """Of the ranks on this machine that have said hello."""
        self.token = ""
        """What a rank must say to be taken for one of these; new at each start."""

    async def start(self) -> None:
        """Starts them in a session of their own; what they print goes into engine.log.

        The session's folder stands in the command line, so that `ps` shows whose they are.
        """
        self.token, self.pids = secrets.token_hex(16), {}
        own = {
            TOKEN_VARIABLE: self.token,
            SOCKET_VARIABLE: str(self._socket_path),
            STORE_VARIABLE: self._meeting_place(),
        }
        with self._session.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *rank_command(self._launch, str(self._session.folder), self.count),
                env=rank_environment(self._launch) | own,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _meeting_place(self) -> str:
        """Where the ranks find each other: a new place at each start."""
        if self._launch.nodes > 1:
            return f"tcp:{self._launch.rendezvous}"
        self._leave_place()
        self._place = tempfile.TemporaryDirectory(prefix="rlhf-tui-")
        return f"file:{self._place.name}/ranks"

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    async def wait(self) -> int:
        """Until they have ended; the exit status, negative for a signal's number."""
        if self._process is None:
            return 0
        status = await self._process.wait()
        self._end_groups(self._process.pid)  # what they had started may have outlived them
        self._leave_place()
        return status

    def kill(self, token: str | None = None) -> None:
        """Ends them at once, with all of their groups; only those of a token, where it is given."""
        process = self._process
        ours = token in (None, self.token)
        if ours and process is not None and process.returncode is None:
            self._end_groups(process.pid)

    def _end_groups(self, leader: int) -> None:
        """The agent's group and its ranks', which torchrun starts in sessions of their own."""
        for group in {leader, *self.pids.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
