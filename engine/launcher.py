"""Starts the ranks, and ends them with everything they started."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from engine.config import LaunchConfig
from engine.protocol import (
    LAUNCH_VARIABLE,
    NICE_VARIABLE,
    PARENT_VARIABLE,
    SOCKET_VARIABLE,
    STORE_VARIABLE,
    TOKEN_VARIABLE,
    surroundings,
)
from engine.session import Session
from engine.telemetry import gpu_count

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Has a thread that waits for the others look a thousand times, some microseconds, and then sleep.

As libgomp comes, threads spin for so long that a step takes 3 to 6 times as long on a machine that
does anything else. Put to sleep at once, a step on an idle one takes an eighth longer: decoding is
thousands of short parallel stretches. Ten thousand looks gain a little more there, and make a step
half as long again beside another busy process."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 23), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Has glibc keep the memory that tensors free rather than give it back, only to ask for it again.

Each time, the kernel cleared every page anew: a fifth of a step's processor time on a CPU. Blocks
over 8 MB do go back: the holes they leave took more memory than clearing takes time."""


class Ranks:
    """The processes of one attempt: a rank alone, or torchrun's agent with several."""

    def __init__(self, session: Session, socket_path: Path, launch: LaunchConfig) -> None:
        self._launch = launch
        self._session = session
        self._socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self.count = processes_here(launch)
        """Ranks on this machine."""
        self.pids: dict[int, int] = {}
        """Of the ranks on this machine that have said hello."""
        self.token = ""
        """What a rank must say to be taken for one of these; new at each start."""

    async def start(self) -> None:
        """Starts them in a session of their own; what they print goes into engine.log.

        The session's folder stands in the command line, so that `ps` shows whose they are.
        """
        self.token, self.pids = secrets.token_hex(16), {}
        own = {
            TOKEN_VARIABLE: self.token,
            SOCKET_VARIABLE: str(self._socket_path),
            STORE_VARIABLE: self._meeting_place(),
        }
        with self._session.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command(self._launch, str(self._session.folder), self.count),
                env=environment(self._launch) | own,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _meeting_place(self) -> str:
        """Where the ranks find each other: a new place at each start."""
        if self._launch.nodes > 1:
            return f"tcp:{self._launch.rendezvous}"
        self._leave_place()
        self._place = tempfile.TemporaryDirectory(prefix="rlhf-tui-")
        return f"file:{self._place.name}/ranks"

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    async def wait(self) -> int:
        """Until they have ended; the exit status, negative for a signal's number."""
        if self._process is None:
            return 0
        status = await self._process.wait()
        self._end_groups(self._process.pid)  # what they had started may have outlived them
        self._leave_place()
        return status

    def kill(self, token: str | None = None) -> None:
        """Ends them at once, with all of their groups; only those of a token, where it is given."""
        process = self._process
        ours = token in (None, self.token)
        if ours and process is not None and process.returncode is None:
            self._end_groups(process.pid)

    def _end_groups(self, leader: int) -> None:
        """The agent's group and its ranks', which torchrun starts in sessions of their own."""
        for group in {leader, *self.pids.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def processes_here(launch: LaunchConfig) -> int:
    """Ranks on one machine: `launch.processes`, or one for each GPU, or one."""
    if isinstance(launch.processes, int):
        return launch.processes
    if launch.device == "cpu":
        return 1
    return len(launch.gpus) or max(1, gpu_count())


def command(launch: LaunchConfig, folder: str, count: int) -> list[str]:
    """What starts the ranks of one machine."""
    if launch.nodes == 1 and count == 1:
        return [sys.executable, "-m", "engine.train.worker", folder]
    return [sys.executable, "-m", "engine.train.agent", folder, str(count)]


def environment(launch: LaunchConfig) -> dict[str, str]:
    """The environment ranks are started with, on any machine."""
    given = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        NICE_VARIABLE: str(launch.nice),
        PARENT_VARIABLE: str(os.getpid()),
        LAUNCH_VARIABLE: msgspec.json.encode(launch).decode(),
    }
    if launch.gpus:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.gpus))
    return WAITING | MALLOC | surroundings() | given


def describe_exit(status: int) -> str:
    """An exit status in words; torchrun's agent passes signal N on as 128 + N."""
    status = 128 - status if status > 128 else status
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (the kernel does this when memory runs out)" if status == -signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended with status {status}"
