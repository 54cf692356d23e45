"""Starts the ranks of one machine by torchrun.

``python -m engine.train.torchrun.agent SESSION_FOLDER``

For more than one rank. Ranks are started once: restarting is the supervisor's business. Like a
rank, the agent dies with who started it, and takes its ranks along.
"""

import contextlib
import logging
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Iterator

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as TorchLaunch
from torch.distributed.launcher.api import elastic_launch

from engine.config.schema import LaunchConfig
from engine.errors import UserInputError
from engine.launch.environment import (
    JOINED_VARIABLE,
    LAUNCH_VARIABLE,
    PARENT_VARIABLE,
    STORE_VARIABLE,
)
from engine.protocol.rank_messages import Failed, JoinInfo
from engine.train.distributed.ranks import threads_of_a_rank
from engine.train.link import Link
from engine.train.torchrun import rendezvous
from engine.train.worker import die_with_parent

JOIN_TIMEOUT = 3600
"""Seconds the first machine waits for the others."""
SHUTDOWN = 2
"""Seconds the ranks that are left have once one has failed; they heed no signal but the last."""


def main() -> None:
    """Runs the ranks to their end; exits with 1 where one failed, 128 + N where signal N did it."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the ranks'
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stdout)
    folder = sys.argv[1]
    launch = msgspec.json.decode(os.environ[LAUNCH_VARIABLE], type=LaunchConfig)
    count = int(sys.argv[2])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(launch, count)))
    try:
        with meeting_place(launch, folder, count):
            elastic_launch(torch_launch(launch, count), sys.executable)(
                "-u", "-m", "engine.train.worker", folder
            )
    except ChildFailedError as error:
        # One that was killed is the cause; those that end by themselves may only have noticed.
        killed = [f.exitcode for f in error.failures.values() if f.exitcode < 0]
        sys.exit(128 - killed[0] if killed else 1)
    except UserInputError as error:
        Link(0).send(Failed(rank=0, text=str(error), user_input=True))
        sys.exit(error.exit_code)
    except Exception as error:
        # No rank has begun: the agent says what a rank would have said.
        text = f"the ranks cannot meet: {type(error).__name__}: {error}"
        Link(0).send(Failed(rank=0, text=text, traceback=traceback.format_exc()))
        raise


def torch_launch(launch: LaunchConfig, count: int) -> TorchLaunch:
    """torchrun's configuration; the agents of several machines meet at the first one's store."""
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    rendezvous.register()
    if kind == "file":
        # Nothing of a run on one machine is to be reached from another one.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    return TorchLaunch(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=count,
        run_id="rlhf-tui",
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=address,
        rdzv_configs={"first": JOINED_VARIABLE not in os.environ, "timeout": JOIN_TIMEOUT},
        local_addr="127.0.0.1" if kind == "file" else None,
        max_restarts=0,
        monitor_interval=0.1,
        # A scheduler's broadcast is for the supervisor, which saves first: see `tie_to_parent`.
        signals_to_handle="SIGQUIT",
        shutdown_timeout=SHUTDOWN,
    )


@contextlib.contextmanager
def meeting_place(launch: LaunchConfig, folder: str, count: int) -> Iterator[None]:
    """On the first of several machines: the server at which ranks and agents meet.

    It also holds the invitation that `rlhf-tui join` reads.
    """
    kind, _, place = os.environ[STORE_VARIABLE].partition(":")
    if kind == "file" or JOINED_VARIABLE in os.environ:
        yield
        return
    host, _, port = place.rpartition(":")
    check_port(int(port))
    store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    start = secrets.token_hex(8)
    invitation = JoinInfo(launch=launch, folder=folder, processes=count, start=start)
    store.set("invitation", msgspec.json.encode(invitation).decode())
    yield


def check_port(port: int) -> None:
    """Whether this machine can listen there. Raises UserInputError."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            raise UserInputError(
                f"launch.rendezvous: cannot listen on port {port} of this machine "
                f"({error.strerror}): give it another one"
            ) from error


if __name__ == "__main__":
    main()
