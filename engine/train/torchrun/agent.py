"""The torchrun agent: starts the ranks of one machine and waits for them to end.

``python -m engine.train.torchrun.agent SESSION_FOLDER PROCESSES``

Used for runs of more than one rank. The agent starts the ranks once and never restarts them; the
supervisor does. Like a rank, it is killed when its parent process ends, and its ranks with it.
"""

import contextlib
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Iterator

import msgspec
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as TorchLaunch
from torch.distributed.launcher.api import elastic_launch

from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.launch.environment import (
    JOINED_VARIABLE,
    LAUNCH_VARIABLE,
    STORE_VARIABLE,
)
from engine.launch.parent_death import PARENT_VARIABLE
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.store_server import StoreServer
from engine.protocol.machines.store_messages import SetKeys
from engine.protocol.rank_messages import JOIN_INFO_KEY, Failed, JoinInfo
from engine.train.distributed.ranks import threads_per_rank
from engine.train.link import Link
from engine.train.torchrun import rendezvous

JOIN_TIMEOUT = 3600
"""Seconds an agent waits for the agents of the other machines."""
SHUTDOWN_TIMEOUT = 2
"""Seconds from SIGTERM to SIGKILL for the remaining ranks after one failed. They ignore SIGTERM."""


def main() -> None:
    """Starts the ranks and waits; exits with 1 if one failed, 128 + N if signal N killed one."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the agent is the parent of its ranks
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stdout)
    folder = sys.argv[1]
    launch = msgspec.json.decode(os.environ[LAUNCH_VARIABLE], type=LaunchConfig)
    count = int(sys.argv[2])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(launch, count)))
    try:
        with serve_store(launch, folder, count):
            elastic_launch(torchrun_config(launch, count), sys.executable)(
                "-u", "-P", "-m", "engine.launch.rank", "engine.train.worker", folder
            )
    except ChildFailedError as error:
        # A killed rank is the cause; a rank that exits may only have lost its connection to it.
        killed = [f.exitcode for f in error.failures.values() if f.exitcode < 0]
        sys.exit(128 - killed[0] if killed else 1)
    except UserInputError as error:
        Link(0).send(Failed(rank=0, text=str(error), user_input=True))
        sys.exit(error.exit_code)
    except Exception as error:
        # No rank is running, so the agent reports the failure in place of a rank.
        text = f"torchrun cannot start the ranks: {type(error).__name__}: {error}"
        Link(0).send(Failed(rank=0, text=text, traceback=traceback.format_exc()))
        raise


def torchrun_config(launch: LaunchConfig, count: int) -> TorchLaunch:
    """The torchrun configuration for `count` ranks on this machine.

    Registers the rendezvous backend. With a `file:` store it also restricts gloo and NCCL to the
    loopback interface, through the environment.
    """
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    rendezvous.register()
    if kind == "file":
        # A run on one machine must not be reachable from the network.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    return TorchLaunch(
        min_nodes=launch.fewest_nodes,
        max_nodes=launch.nodes,
        nproc_per_node=count,
        run_id="rlhf-tui",
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=address,
        rdzv_configs={
            "first": JOINED_VARIABLE not in os.environ,
            "timeout": JOIN_TIMEOUT,
            "join_wait": launch.join_wait,
        },
        local_addr="127.0.0.1" if kind == "file" else None,
        max_restarts=0,
        monitor_interval=0.1,
        # torchrun would forward a scheduler's SIGTERM to the ranks. The supervisor handles it: it
        # finishes and saves the step first. See :mod:`engine.launch.rank`.
        signals_to_handle="SIGQUIT",
        shutdown_timeout=SHUTDOWN_TIMEOUT,
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
