"""The rollout engines of a session: all of their processes, and the folders for their weights."""

import asyncio
from collections.abc import Callable

from engine.config.schema import RunConfig
from engine.launch.environment import (
    ROLLOUT_DISK_VARIABLE,
    ROLLOUT_FOLDER_VARIABLE,
    rollout_socket_variable,
)
from engine.launch.rollout_engine import is_separate, shared_folder
from engine.session.folder import Session
from engine.session.temporary_folders import TemporaryFolder
from engine.supervisor.rollout_process import RolloutProcess
from engine.supervisor.state import SupervisorState


class RolloutEngines:
    """`rollout.engines` processes, each restarted by itself; none for native rollouts."""

    def __init__(
        self,
        session: Session,
        config: RunConfig,
        state: SupervisorState,
        *,
        on_restart: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Starts nothing yet; the arguments are those of :class:`RolloutProcess`."""
        count = config.rollout.engines if is_separate(config.rollout) else 0
        self.processes = [
            RolloutProcess(
                session, config, state, engine, on_restart=on_restart, on_failure=on_failure
            )
            for engine in range(count)
        ]
        self._state = state
        self._folders: list[TemporaryFolder] = []

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
