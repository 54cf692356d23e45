"""The torchrun agent: starts the ranks of one machine and waits for them to end.

``python -m engine.train.torchrun.agent SESSION_FOLDER PROCESSES``

Used for runs of more than one rank. The agent starts the ranks once; only the supervisor restarts
them. Like a rank, it is killed when its parent process ends, and its ranks with it.
"""

import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from engine.config.sections.launch import LaunchConfig
from engine.errors import MAX_MESSAGE, UserInputError, error_text, shortened, traceback_text
from engine.examined import examined
from engine.launch.environment import (
    JOINED_VARIABLE,
    LAUNCH_VARIABLE,
    STORE_VARIABLE,
    threads_per_rank,
)
from engine.launch.parent_death import PARENT_VARIABLE
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.store_server import StoreServer
from engine.log_lines import log_to
from engine.protocol.machines.store_messages import SetKeys
from engine.protocol.rank_messages import JOIN_INFO_KEY, Failed, JoinInfo
from engine.session.temporary_folders import TemporaryFolder
from engine.train.link import Link
from engine.train.torchrun.rendezvous import StoreRendezvous

JOIN_TIMEOUT = 3600
"""Seconds an agent waits for the agents of the other machines."""
SHUTDOWN_TIMEOUT = 2
"""Seconds from SIGTERM to SIGKILL for the remaining ranks after one failed. They ignore SIGTERM."""


def main() -> None:
    """Starts the ranks and waits; exits with 1 if one failed, 128 + N if signal N killed one."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the agent is the parent of its ranks
    log_to(sys.stdout, logging.WARNING)
    folder = sys.argv[1]
    launch = msgspec.json.decode(os.environ[LAUNCH_VARIABLE], type=examined(LaunchConfig))
    count = int(sys.argv[2])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(launch, count)))
    try:
        with serve_store(launch, folder, count), contextlib.closing(torch_folder()) as temporary:
            agent = Agent(worker_spec(launch, count, folder), temporary.path)
            result = agent.run()
    except UserInputError as error:
        Link(0).send(Failed(rank=0, text=str(error), user_input=True))
        sys.exit(error.exit_code)
    except Exception as error:
        # No rank is running, so the agent reports the failure in place of a rank.
        reason = shortened(error_text(error), MAX_MESSAGE)
        text = f"torchrun cannot start the ranks: {type(error).__name__}: {reason}"
        Link(0).send(Failed(rank=0, text=text, traceback=traceback_text(error)))
        raise
    if result.is_failed():
        # A killed rank is the cause; a rank that exits may only have lost its connection to it.
        killed = [code for code in agent.failed if code < 0]
        sys.exit(128 - killed[0] if killed else 1)


class Agent(LocalElasticAgent):
    """torch's agent, except that it ends the other ranks :data:`SHUTDOWN_TIMEOUT` after a failure.

    torch always gives them 30 seconds. A rank that waits for the failed one in a collective ends by
    itself, but one in a long reward function does not.
    """

    def __init__(self, spec: WorkerSpec, temporary: Path) -> None:
        """Starts nothing yet; torch creates folders for each rank in `temporary`."""
        # torchrun would forward a scheduler's SIGTERM to the ranks. The supervisor handles it: it
        # finishes and saves the step first. See :mod:`engine.launch.rank`.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        super().__init__(spec, DefaultLogsSpecs(str(temporary)))
        self.failed: list[int] = []
        """Exit codes of the ranks that failed before the others were ended; -N for signal N."""

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0, **_named: Any
    ) -> None:
        """Ends the ranks. The arguments after the signal depend on the version of torch."""
        del timeout
        if self._pcontext is not None:
            self._pcontext.close(death_sig, SHUTDOWN_TIMEOUT)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called by torch every `monitor_interval` seconds."""
        codes = [exit_code(worker.id) for worker in worker_group.workers]
        self.failed = [code for code in codes if code]
        if self.failed:
            self._shutdown()
        elif None in codes:
            # torch would also notice ranks that fail from now on.
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)


def torch_folder() -> TemporaryFolder:
    """The folder for torch's agent, which would leave one behind.

    On one machine it is in the folder that the supervisor removes, however the agent ends.
    """
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    return TemporaryFolder(Path(address).parent if kind == "file" else None)


def exit_code(pid: int) -> int | None:
    """Returns the exit code of a child process, -N for signal N; None while it runs.

    The process remains a zombie, so that torch can read its status, too.
    """
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def worker_spec(launch: LaunchConfig, count: int, folder: str) -> WorkerSpec:
    """Describes `count` ranks on this machine to torch's agent.

    With a `file:` store this also restricts gloo and NCCL to the loopback interface, through the
    environment.
    """
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    if kind == "file":
        # A run on one machine must not be reachable from the network.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    return WorkerSpec(
        role="rank",
        local_world_size=count,
        entrypoint=sys.executable,
        args=("-u", "-P", "-m", "engine.launch.rank", "engine.train.worker", folder),
        rdzv_handler=StoreRendezvous(
            address,
            launch.nodes,
            JOIN_TIMEOUT,
            first=JOINED_VARIABLE not in os.environ,
            secret=os.environ.get(SECRET_VARIABLE, ""),
            fewest=launch.fewest_nodes,
            join_wait=launch.join_wait,
        ),
        local_addr="127.0.0.1" if kind == "file" else None,
        max_restarts=0,
        monitor_interval=0.1,
    )


@contextlib.contextmanager
def serve_store(launch: LaunchConfig, folder: str, count: int) -> Iterator[None]:
    """Serves the store of all ranks and agents, on the first of several machines.

    The store also holds the :class:`JoinInfo` that `rlhf-tui join` reads. On every other machine,
    and in a run on one machine, the context does nothing.

    Raises:
        UserInputError: the port of `launch.rendezvous` is in use.
    """
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    if kind == "file" or JOINED_VARIABLE in os.environ:
        yield
        return
    try:
        server = StoreServer(address, os.environ[SECRET_VARIABLE].encode())
    except OSError as error:
        port = address.rpartition(":")[2]
        raise UserInputError(
            f"launch.rendezvous: cannot listen on port {port} of this machine "
            f"({error.strerror}): choose another port"
        ) from error
    start = secrets.token_hex(8)
    info = JoinInfo(launch=launch, folder=folder, processes=count, start=start)
    server.values.handle(SetKeys(values={JOIN_INFO_KEY: msgspec.json.encode(info)}))
    with contextlib.closing(server):
        yield


if __name__ == "__main__":
    main()
