"""Joins a machine to a run: ``python -m engine.train.torchrun.join HOST:PORT PROCESSES SECONDS``.

`rlhf-tui join` executes this module. It reads the :class:`JoinInfo` from the store of the first
machine, starts the ranks of this machine, and repeats this when the run restarts, until it ends.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from engine import __version__
from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import (
    JOINED_VARIABLE,
    STORE_VARIABLE,
    rank_command,
    rank_environment,
    ranks_per_node,
)
from engine.protocol.rank_messages import JoinInfo
from engine.train.torchrun.rendezvous import JOIN_INFO_KEY

RETRY = 2.0
"""Seconds between two attempts to reach the first machine, and between two checks of its store."""
GRACE = 30.0
"""Seconds the ranks have to end by themselves after the store of the first machine is gone."""
OTHER_VERSION = "the first machine runs another version of rlhf-tui: install the same on all"
DONE, INVALID, TIMED_OUT = 0, 2, 4
"""Exit codes."""


def main() -> None:
    """Runs until the run ends (exit code 0), cannot be joined (2), or cannot be reached (4)."""
    address, wait = sys.argv[1], float(sys.argv[3])
    processes = int(sys.argv[2]) if sys.argv[2] != "auto" else None
    # When a user or a scheduler ends this process, its ranks are killed with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print_status(f"waiting for a run at {address}")
    previous_start = ""
    while True:
        store, info = wait_for_join_info(address, wait, previous_start)
        if store is None:
            exit_with(f"no run at {address}: it has ended, or its machine is down", TIMED_OUT)
        elif isinstance(info, str):
            exit_with(info, INVALID)
        else:
            # `launch.gpus` selects GPUs of the first machine, not of this one.
            launch = msgspec.structs.replace(info.launch, gpus=[])
            count = processes or ranks_per_node(launch)
            ranks = "1 rank" if count == 1 else f"{count} ranks"
            print_status(f"joining {Path(info.folder).name} at {address} with {ranks}")
            if run_agent(store, address, launch, info.folder, count) == 0:
                exit_with("the run is over", DONE)
            print_status("the ranks ended before the run did; waiting for a restart")
            previous_start = info.start


def wait_for_join_info(
    address: str, wait: float, previous_start: str
) -> tuple[TCPStore | None, JoinInfo | str]:
    """Polls the first machine's store until it describes a start of the ranks that can be joined.

    Args:
        address: `HOST:PORT` of the store.
        wait: seconds without a response from the store before this gives up.
        previous_start: `JoinInfo.start` of the ranks that this machine has lost, or "". That start
            is never returned: its remaining ranks accept no new peers, and torchrun would restart
            them without the supervisor's knowledge.

    Returns:
        The store and the join info, or the store and the reason why this machine cannot join.
        ``(None, "")`` after a timeout.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            # torch prints a long warning for every refused connection: check the port first.
            socket.create_connection((host, int(port)), RETRY).close()
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=10))
            info = decode_join_info(store.get(JOIN_INFO_KEY))
            if isinstance(info, str) or info.start != previous_start:
                return store, info
            deadline = time.monotonic() + wait
        except (OSError, dist.DistError, RuntimeError):
            pass
        time.sleep(RETRY)
    return None, ""


def decode_join_info(content: bytes) -> JoinInfo | str:
    """Decodes and checks a :class:`JoinInfo`; returns the reason if this machine cannot join."""
    try:
        info = msgspec.json.decode(content, type=JoinInfo)
    except msgspec.DecodeError:
        return OTHER_VERSION
    if info.software != __version__:
        return OTHER_VERSION
    if not Path(info.folder).is_dir():
        return (
            f"the session's folder {info.folder} does not exist here: all machines need it under "
            "the same path, on a file system they share"
        )
    return info


def run_agent(store: TCPStore, address: str, launch: LaunchConfig, folder: str, count: int) -> int:
    """Starts this machine's agent and returns its exit status.

    Kills the agent and its ranks when the store has been gone for :data:`GRACE` seconds. Ranks that
    wait in a NCCL collective do not notice that the first machine is gone, and would keep this
    machine from joining the next start.
    """
    variables = {STORE_VARIABLE: f"tcp:{address}", JOINED_VARIABLE: "1"}
    process = subprocess.Popen(  # noqa: S603 - our own module
        rank_command(launch, folder, count),
        env=rank_environment(launch) | variables,
        stdin=subprocess.DEVNULL,
    )
    last_seen = time.monotonic()
    while True:
        try:
            return process.wait(RETRY)
        except subprocess.TimeoutExpired:
            if is_alive(store):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > GRACE:
                process.kill()  # its ranks are killed with it


def is_alive(store: TCPStore) -> bool:
    """Whether the server of a store responds."""
    try:
        return store.check([JOIN_INFO_KEY])
    except (dist.DistError, RuntimeError):
        return False


def print_status(text: str) -> None:
    """Prints a line for the person at this machine."""
    sys.stdout.write(f"rlhf-tui: {text}\n")
    sys.stdout.flush()


def exit_with(text: str, code: int) -> None:
    """Prints a line and ends the process."""
    print_status(text)
    # Not sys.exit: threads of the store client may never end.
    os._exit(code)


if __name__ == "__main__":
    main()
