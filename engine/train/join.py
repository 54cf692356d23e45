"""One more machine for a run: ``python -m engine.train.join HOST:PORT PROCESSES SECONDS``.

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

from engine.config import LaunchConfig
from engine.launcher import command, environment, processes_here
from engine.protocol import JOINED_VARIABLE, STORE_VARIABLE, VERSION, Invitation

RETRY = 2.0
"""Seconds between looks whether the first machine is there (again)."""
DONE, WRONG, WAITED = 0, 2, 4


def main() -> None:
    """Until the run is over (0), the invitation cannot be taken (2), or nobody is there (4)."""
    place, wait = sys.argv[1], float(sys.argv[3])
    given = int(sys.argv[2]) if sys.argv[2] != "auto" else None
    # Stopped from the keyboard or by a scheduler: its ranks die with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    say(f"waiting for a run at {place}")
    while True:
        invitation = await_invitation(place, wait)
        if invitation is None:
            end(f"nobody answers at {place}: the run is over, or its machine is gone", WAITED)
        elif problem := check(invitation):
            end(problem, WRONG)
        else:
            launch = invitation.launch
            count = given or processes_here(msgspec.structs.replace(launch, gpus=[]))
            say(f"joining {Path(invitation.folder).name} at {place} with {count} rank(s)")
            if run_agent(place, launch, invitation.folder, count) == 0:
                end("the run is over", DONE)
            say("the ranks ended before the run did; waiting for it to start again")
            time.sleep(RETRY)


def await_invitation(place: str, wait: float) -> Invitation | None:
    """What the first machine says, or None when it says nothing for `wait` seconds."""
    host, _, port = place.rpartition(":")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        try:
            # torch prints a page for each connection refused: it is asked once somebody listens.
            socket.create_connection((host, int(port)), RETRY).close()
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=10))
            return msgspec.json.decode(store.get("invitation"), type=Invitation)
        except (OSError, dist.DistError, RuntimeError):
            time.sleep(RETRY)
    return None


def check(invitation: Invitation) -> str | None:
    """What stands against taking it, in words."""
    if invitation.version != VERSION:
        return "the first machine runs another version of rlhf-tui: install the same on all"
    if not Path(invitation.folder).is_dir():
        return (
            f"the session's folder {invitation.folder} is not here: all machines need it under "
            "the same path, on a file system they share"
        )
    return None


def run_agent(place: str, launch: LaunchConfig, folder: str, count: int) -> int:
    """This machine's ranks, to their end; the exit status of their agent."""
    own = {STORE_VARIABLE: f"tcp:{place}", JOINED_VARIABLE: "1"}
    process = subprocess.Popen(  # noqa: S603 - ourselves
        command(launch, folder, count), env=environment(launch) | own, stdin=subprocess.DEVNULL
    )
    return process.wait()


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
