"""A rollout engine's process: started and ended with the ranks, restarted when it ends.

It serves rank 0 on a socket that the supervisor holds open, so a rank can connect at any time: the
connection waits for the next engine.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config.schema import RunConfig
from engine.protocol import sockets
from engine.protocol.rollout.messages import ATTEMPTS
from engine.session import access
from engine.session.folder import SessionFolder
from engine.supervisor.processes.exit_status import describe_exit
from engine.supervisor.state import SupervisorState

log = logging.getLogger("engine")

MAX_REPLACED = 5 * ATTEMPTS
"""Number of an engine's processes that may end with status 0 in a step. Rank 0 gives up after
:data:`ATTEMPTS` in a row, and asks for responses a few times, so if more end, they end by
themselves, such as those of a script that is not an engine."""


@dataclass(frozen=True)
class Program:
    """The command and environment that start an engine."""

    command: list[str]
    environment: dict[str, str]
    port_fd: int | None = None
    """A descriptor that the process inherits in addition to its socket's."""


class RolloutProcess:
    """One of the rollout engines of a session."""

    def __init__(
        self,
        session: SessionFolder,
        config: RunConfig,
        state: SupervisorState,
        program: Callable[[int, int], Program],
        engine: int,
        *,
        on_restart: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            session: its folder gets the socket and the log.
            config: the run's configuration.
            state: counts how often engines have ended in a step.
            program: called with the number of the engine and the descriptor of its socket.
            engine: the number of this one, from 0.
            on_restart: called with the reason when the engine has been restarted. It may raise
                sqlite3.Error, which is logged.
            on_failure: called with the reason when the engine is not restarted any more.
        """
        self._session, self._config, self._state = session, config, state
        self._program, self._engine = program, engine
        several = config.rollout.engines > 1
        self._name = f"rollout engine {engine}" if several else "the rollout engine"
        self._on_restart, self._on_failure = on_restart, on_failure
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._path: Path | None = None

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while no process runs."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def log_file(self) -> Path:
        """The log of the engine's output."""
        return self._session.rollout_log_file(self._engine)

    async def start(self) -> Path:
        """Starts the engine for an attempt; returns the path of its socket.

        Raises:
            OSError: the engine's Python cannot be started.
        """
        await self.stop()
        name = sockets.rollout_name(self._engine)
        self._listener, self._path = sockets.listen(self._session.folder, name)
        await self._spawn(self._listener)
        self._watch = asyncio.create_task(self._keep_alive(self._listener))
        self._watch.add_done_callback(self._on_watch_end)
        return self._path

    async def _spawn(self, listener: socket.socket) -> None:
        fd = listener.fileno()
        program = self._program(self._engine, fd)
        with access.open_to_append(self.log_file) as output:
            self._process = await asyncio.create_subprocess_exec(
                *program.command,
                env=program.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[fd] if program.port_fd is None else [fd, program.port_fd],
                start_new_session=True,
            )

    async def _keep_alive(self, listener: socket.socket) -> None:
        """Restarts the engine whenever it ends, at most `launch.max_restarts` times in a step.

        Ends with status 0 are limited by :data:`MAX_REPLACED` instead.
        """
        while self._process is not None:
            status = await self._process.wait()
            self._kill_group(self._process.pid)  # workers of tensor parallelism
            if self._state.attempt.ended is not None:  # the run is over
                return
            # 0: rank 0 has closed the connection, to get another engine
            counts = self._state.rollout_restarts if status else self._state.rollout_replaced
            limit = self._config.launch.max_restarts if status else MAX_REPLACED
            counts[self._engine] += 1
            text = f"{self._name} {describe_exit(status)}"
            if counts[self._engine] > limit:
                self._on_failure(f"{text}, again; see {self.log_file}")
                return
            if status:  # reported first: the attempt may end while another one is being started
                self._report(f"{text}: another one is started")
            try:
                await self._spawn(listener)
            except OSError as error:
                self._on_failure(f"{self._name} cannot be started again: {error}")
                return

    def _report(self, text: str) -> None:
        try:
            self._on_restart(text)
        except sqlite3.Error as error:  # a full disk must not leave the ranks without an engine
            log.warning("%s (cannot write the journal: %s)", text, error)

    def _on_watch_end(self, task: asyncio.Task[None]) -> None:
        """Ends the attempt if the task failed: the ranks would wait for an engine forever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            text = f"{self._name} is no longer watched"
            log.error(text, exc_info=error)
            self._on_failure(f"{text}: {type(error).__name__}: {error}")

    async def stop(self) -> None:
        """Ends the engine and removes its socket."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        process = self._process
        if process is not None:
            self._kill_group(process.pid)
            await process.wait()
        if self._listener is not None:
            self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._process = self._watch = self._listener = self._path = None

    def _kill_group(self, leader: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
