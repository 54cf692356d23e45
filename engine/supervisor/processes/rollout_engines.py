"""The rollout engines of a session: all their processes, and the folders for their weights."""

import asyncio
import socket
from collections.abc import Callable

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.launch.environment import (
    ROLLOUT_DISK_VARIABLE,
    ROLLOUT_FOLDER_VARIABLE,
    rollout_socket_variable,
)
from engine.launch.rollout.engine import (
    rollout_command,
    rollout_environment,
    shared_folder,
)
from engine.launch.rollout.port import announce_end
from engine.launch.rollout.relay import relay_command, relay_environment
from engine.launch.store_server import listen_at
from engine.protocol.rollout.join_messages import rollout_secret
from engine.session.folder import SessionFolder
from engine.session.temporary_folders import TemporaryFolder
from engine.supervisor.processes.rollout_process import Program, RolloutProcess
from engine.supervisor.state import SupervisorState


class RolloutEngines:
    """`rollout.engines` processes, each restarted on its own; none for native rollouts.

    For an engine on another machine, a relay runs here in its place.
    """

    def __init__(
        self,
        session: SessionFolder,
        config: RunConfig,
        state: SupervisorState,
        secret: str,
        *,
        on_restart: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            session: its folder gets sockets and logs.
            config: the run's configuration.
            state: counts how often engines have ended in a step.
            secret: of the run, if engines run on other machines.
            on_restart: as for :class:`RolloutProcess`.
            on_failure: as for :class:`RolloutProcess`.
        """
        self._session, self._config, self._state = session, config, state
        self._secret = secret
        count = config.rollout.engines if config.rollout.uses_vllm else 0
        self.joined = config.rollout.joined if count else 0
        """How many of them are on other machines, the last ones."""
        self.processes = [
            RolloutProcess(
                session, config, state, self._program, engine,
                on_restart=on_restart, on_failure=on_failure,
            )
            for engine in range(count)
        ]  # fmt: skip
        self._folders: list[TemporaryFolder] = []
        self._port: socket.socket | None = None
        """The port at which other machines join."""

    def listen(self) -> None:
        """Opens the port at which machines that generate join, if the run uses any.

        Raises:
            UserInputError: the port is in use.
        """
        address = self._config.rollout.rendezvous
        if not self.joined or address is None:
            return
        try:
            self._port = listen_at(address)
        except OSError as error:
            raise UserInputError(
                f"rollout.rendezvous: cannot listen on port {address.rpartition(':')[2]} of this "
                f"machine ({error.strerror}): choose another port"
            ) from error

    @property
    def port(self) -> int | None:
        """The port that it listens on; None if it does not listen."""
        return None if self._port is None else int(self._port.getsockname()[1])

    def _program(self, engine: int, listener_fd: int) -> Program:
        config, folder = self._config, self._session.folder
        if engine < config.rollout.local_engines or self._port is None:
            return Program(
                rollout_command(config.rollout, listener_fd, folder, engine),
                rollout_environment(config, engine),
            )
        port = self._port.fileno()
        return Program(
            relay_command(listener_fd, port, folder, engine), relay_environment(self._secret), port
        )

    async def start(self) -> dict[str, str]:
        """Starts the engines for an attempt; returns the variables by which rank 0 finds them.

        Raises:
            OSError: the engines' Python cannot be started.
        """
        if not self.processes:
            return {}
        await self.stop()
        shared, disk = TemporaryFolder(shared_folder()), TemporaryFolder()
        self._folders = [shared, disk]
        self._state.rollout_restarts.clear()
        self._state.rollout_replaced.clear()
        variables = {
            ROLLOUT_FOLDER_VARIABLE: str(shared.path),
            ROLLOUT_DISK_VARIABLE: str(disk.path),
        }
        for engine, process in enumerate(self.processes):
            variables[rollout_socket_variable(engine)] = str(await process.start())
        return variables

    async def stop(self) -> None:
        """Ends the engines and removes their sockets and their files."""
        await asyncio.gather(*(process.stop() for process in self.processes))
        for folder in self._folders:
            folder.close()
        self._folders = []

    async def close(self) -> None:
        """Ends the engines for good, tells their machines so, and closes the port."""
        await self.stop()
        if self._port is not None:
            secret = rollout_secret(self._secret)
            await asyncio.to_thread(announce_end, self._port, secret, self.joined)
            self._port.close()
            self._port = None
