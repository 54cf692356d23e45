"""Starts the rank processes and ends them, with every process they started."""

import asyncio
import contextlib
import os
import secrets
import signal
from pathlib import Path

import psutil

from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import (
    SOCKET_VARIABLE,
    STORE_VARIABLE,
    TOKEN_VARIABLE,
    rank_command,
    rank_environment,
    ranks_per_node,
)
from engine.launch.secret import SECRET_VARIABLE
from engine.session import access
from engine.session.folder import SessionFolder
from engine.session.temporary_folders import TemporaryFolder


class RankProcesses:
    """The processes of one attempt: a single rank, or torchrun's agent with several."""

    def __init__(
        self, session: SessionFolder, socket_path: Path, launch: LaunchConfig, secret: str = ""
    ) -> None:
        self._launch = launch
        self._session = session
        self._socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None
        self._rendezvous: TemporaryFolder | None = None
        self.count = ranks_per_node(launch)
        """Ranks on this machine."""
        self.pids: dict[int, int] = {}
        """Rank → process id, of the ranks on this machine that have connected."""
        self._leaders: dict[int, psutil.Process] = {}
        """The agent and its ranks, by process id, with the times at which they started."""
        self.token = ""
        """Proves that a rank belongs to the current attempt; new at each start."""
        self.secret = secret if launch.nodes > 1 else ""
        """Proves that a machine belongs to the run; empty if all ranks are on one machine."""

    async def start(self, rollout: dict[str, str]) -> None:
        """Starts the processes in a session of their own; their output goes to engine.log.

        The session's folder is part of the command line, so that `ps` shows the owner.

        Args:
            rollout: environment variables by which rank 0 finds its rollout engine; empty for
                native rollouts.
        """
        self.token, self.pids, self._leaders = secrets.token_hex(16), {}, {}
        link = {
            TOKEN_VARIABLE: self.token,
            SOCKET_VARIABLE: str(self._socket_path),
            STORE_VARIABLE: self._create_rendezvous(),
        }
        if self.secret:
            link[SECRET_VARIABLE] = self.secret
        with access.open_to_append(self._session.log_file) as log:
            self._process = await asyncio.create_subprocess_exec(
                *rank_command(self._launch, str(self._session.folder), self.count),
                env=rank_environment(self._launch, self.count) | link | rollout,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._add_leader(self._process.pid)

    def rank_connected(self, rank: int, pid: int) -> None:
        """Registers a rank of this machine, so that :meth:`kill` ends its process group, too.

        Args:
            rank: its number.
            pid: from :func:`~engine.protocol.sockets.peer_pid`. 0, a rank that is not visible from
                here, is left to its agent: process group 0 would be the supervisor's own.
        """
        if pid:
            self.pids[rank] = pid
            self._add_leader(pid)

    def _add_leader(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # its group may live on
            self._leaders[pid] = psutil.Process(pid)

    def _create_rendezvous(self) -> str:
        """Returns the address at which the ranks find each other; a new one for each start."""
        if self._launch.nodes > 1:
            return f"tcp:{self._launch.rendezvous}"
        self._remove_rendezvous()
        self._rendezvous = TemporaryFolder()
        return f"file:{self._rendezvous.path}/ranks"

    def _remove_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None

    async def wait(self) -> int:
        """Waits for the end of the processes.

        Returns:
            The exit status; the negative signal number if a signal ended them.
        """
        if self._process is None:
            return 0
        status = await self._process.wait()
        self._kill_groups(self._process.pid)  # child processes may have outlived the ranks
        self._remove_rendezvous()
        return status

    def kill(self, token: str | None = None) -> None:
        """Kills all processes at once.

        Args:
            token: kill only if this is the token of the current attempt.
        """
        process = self._process
        current = token in (None, self.token)
        if current and process is not None and process.returncode is None:
            self._kill_groups(process.pid)

    def _kill_groups(self, leader: int) -> None:
        """Kills the agent's group and those of its ranks, which have sessions of their own."""
        for group in {leader, *self.pids.values()}:
            process = self._leaders.get(group)
            # Not if no file can be opened to look: no rank may be left behind.
            with contextlib.suppress(OSError):
                # The agent has reaped ranks that ended early, and others may have their ids by now.
                if process is not None and not process.is_running() and psutil.pid_exists(group):
                    continue
            # Not permitted: a group of another user, so none of ours.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
