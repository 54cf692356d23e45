"""One more machine for a run: ``python -m engine.train.torchrun.join HOST:PORT PROCESSES SECONDS``.

What `rlhf-tui join` becomes. It reads the invitation at the first machine, starts ranks of its own,
and does so again when the run starts again, until the run is over.
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
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine import __version__
from engine.config.schema import LaunchConfig
from engine.launch.environment import (
    JOINED_VARIABLE,
    STORE_VARIABLE,
    rank_command,
    rank_environment,
    ranks_per_node,
)
from engine.protocol.rank_messages import JoinInfo

RETRY = 2.0
"""Seconds between looks whether the first machine is there (again)."""
GRACE = 30.0
"""Seconds that ranks have to end by themselves once the first machine has ended its own."""
OTHER_VERSION = "the first machine runs another version of rlhf-tui: install the same on all"
DONE, WRONG, WAITED = 0, 2, 4


def main() -> None:
    """Until the run is over (0), the invitation cannot be taken (2), or nobody is there (4)."""
    place, wait = sys.argv[1], float(sys.argv[3])
    given = int(sys.argv[2]) if sys.argv[2] != "auto" else None
    # Stopped from the keyboard or by a scheduler: its ranks die with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    say(f"waiting for a run at {place}")
    left = ""
    while True:
        store, invitation = await_invitation(place, wait, left)
        if store is None:
            end(f"nobody answers at {place}: the run is over, or its machine is gone", WAITED)
        elif isinstance(invitation, str):
            end(invitation, WRONG)
        else:
            # Which GPUs the first machine may use says nothing of those here.
            launch = msgspec.structs.replace(invitation.launch, gpus=[])
            count = given or ranks_per_node(launch)
            ranks = "1 rank" if count == 1 else f"{count} ranks"
            say(f"joining {Path(invitation.folder).name} at {place} with {ranks}")
            if run_agent(store, place, launch, invitation.folder, count) == 0:
                end("the run is over", DONE)
            say("the ranks ended before the run did; waiting for it to start again")
            left = invitation.start


def await_invitation(place: str, wait: float, left: str) -> tuple[TCPStore | None, JoinInfo | str]:
    """What the first machine says, at its store; no store when nobody is there for `wait` seconds.

    An invitation to the ranks that this machine has `left` is none: those who are still among them
    cannot be met again, and torchrun would start them anew behind the supervisor's back.
    """
    host, _, port = place.rpartition(":")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            # torch prints a page for each connection refused: it is asked once somebody listens.
            socket.create_connection((host, int(port)), RETRY).close()
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=10))
            invitation = read(store.get("invitation"))
            if isinstance(invitation, str) or invitation.start != left:
                return store, invitation
            deadline = time.monotonic() + wait
        except (OSError, dist.DistError, RuntimeError):
            pass
        time.sleep(RETRY)
    return None, ""


def read(content: bytes) -> JoinInfo | str:
    """The invitation, or what stands against taking it, in words."""
    try:
        invitation = msgspec.json.decode(content, type=JoinInfo)
    except msgspec.DecodeError:
        return OTHER_VERSION
    if invitation.software != __version__:
        return OTHER_VERSION
    if not Path(invitation.folder).is_dir():
        return (
            f"the session's folder {invitation.folder} is not here: all machines need it under "
            "the same path, on a file system they share"
        )
    return invitation


def run_agent(store: TCPStore, place: str, launch: LaunchConfig, folder: str, count: int) -> int:
    """This machine's ranks, to their end; the exit status of their agent.

    Ranks that wait in a GPU's collective do not notice that the first machine is gone: they are
    ended when its store is, so that they can join what it starts next.
    """
    own = {STORE_VARIABLE: f"tcp:{place}", JOINED_VARIABLE: "1"}
    process = subprocess.Popen(  # noqa: S603 - ourselves
        rank_command(launch, folder, count),
        env=rank_environment(launch) | own,
        stdin=subprocess.DEVNULL,
    )
    seen = time.monotonic()
    while True:
        try:
            return process.wait(RETRY)
        except subprocess.TimeoutExpired:
            if is_there(store):
                seen = time.monotonic()
            elif time.monotonic() - seen > GRACE:
                process.kill()  # its ranks die with it


def is_there(store: TCPStore) -> bool:
    """Whether the server of a store lives."""
    try:
        return store.check(["invitation"])
    except (dist.DistError, RuntimeError):
        return False


def say(text: str) -> None:
    """A line for the person who joined this machine."""
    sys.stdout.write(f"rlhf-tui: {text}\n")
    sys.stdout.flush()


def end(text: str, code: int) -> None:
    """The last line."""
    say(text)
    # Nothing is left to wait for, and threads of the store may be.
    os._exit(code)


if __name__ == "__main__":
    main()
