"""One start of the ranks: which are connected, which failed, and why the attempt ended."""

import asyncio
import contextlib

import msgspec

from engine.config.sections.launch import LaunchConfig
from engine.launch.start_options import StartOptions
from engine.protocol import frames
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Ended, Failed
from engine.supervisor.processes.exit_status import describe_exit

DRAIN_TIMEOUT = 10.0
"""Seconds to read the last messages of ranks whose processes have ended."""


def description(start: StartOptions, number: int, *, first: bool) -> str:
    """A line for the log: `attempt 2 begins from step 120: roll back by ana`.

    Args:
        start: of the attempt.
        number: of the attempt.
        first: whether it is the first one of this engine.
    """
    reason = "restart"
    if start.origin:
        reason = f"fork of '{start.origin['from']}'"
    elif first:
        reason = "start" if number == 1 else "resume"
    elif start.fresh:
        reason = "roll back"
    by = f" by {' '.join(start.who.split())}" if start.who else ""
    return f"attempt {number} begins from step {start.from_step}: {reason}{by}"


class Attempt:
    """The ranks of one start: what is known of them from their messages and connections."""

    def __init__(self, start: StartOptions) -> None:
        self.start = start
        self.unknown: list[int] = []
        """The steps of checkpoints after its start that the journal does not have."""
        self.failure: Failed | None = None
        """The most informative failure reported so far."""
        self.ended: Ended | None = None
        """Rank 0's report of a regular end."""
        self.ready = False
        """Whether the models are loaded. No command is carried out before."""
        self._rank0: asyncio.StreamWriter | None = None
        self._connected: set[int] = set()
        self._all_disconnected = asyncio.Event()
        self._reported: set[int] = set()  # ranks that reported why they failed
        self.lost: list[int] = []
        """Ranks that disconnected without a reason, in order."""

    def is_connected(self, rank: int) -> bool:
        """Whether a rank's connection is open."""
        return rank in self._connected

    def rank_connected(self, rank: int, writer: asyncio.StreamWriter) -> None:
        """Registers a rank after its hello. Commands are sent to rank 0."""
        self._connected.add(rank)
        self._all_disconnected.clear()
        if rank == 0:
            self._rank0 = writer

    def send(self, message: Message) -> None:
        """Sends a message to rank 0; does nothing while rank 0 is not connected."""
        if self._rank0 is not None and not self._rank0.is_closing():
            self._rank0.write(frames.encode(message))

    def record_failure(self, failure: Failed) -> None:
        """Keeps the first failure that is not a consequence of another rank's failure."""
        self._reported.add(failure.rank)
        if self.failure is None or (self.failure.echo and not failure.echo):
            self.failure = failure

    def rank_disconnected(self, rank: int) -> None:
        """Registers the end of a rank's connection."""
        self._connected.discard(rank)
        if not self._connected:
            self._all_disconnected.set()
        # Another rank may already have reported that this one is gone.
        if self.ended is None and rank not in self._reported:
            self.lost.append(rank)

    async def wait_disconnected(self) -> None:
        """Waits until all connections are closed: sockets may still hold the last messages."""
        if self._connected:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_disconnected.wait(), DRAIN_TIMEOUT)

    @property
    def failed_by_itself(self) -> bool:
        """Whether a rank reported a failure other than the loss of another rank."""
        return self.failure is not None and not self.failure.echo

    def cause(self, status: int, launch: LaunchConfig, logs: str) -> Failed:
        """The reason of an irregular end.

        A rank's own report takes precedence over what the other ranks noticed of its end.

        Args:
            status: exit status of the process that was started.
            launch: how the ranks were started.
            logs: the command that shows the log, for the message.
        """
        failure = self.failure
        if failure is not None and not failure.echo:
            return failure
        if failure is not None and not self.lost:
            if launch.nodes == 1:  # a rank hangs, and the others have waited for launch.timeout
                return failure
            text = f"the ranks of another machine are gone ({failure.text}); start them there with"
            text += f": rlhf-tui join {launch.rendezvous}"
            return msgspec.structs.replace(failure, text=text)
        rank = self.lost[0] if self.lost else 0
        text = f"rank {rank} {describe_exit(status)}; see {logs}"
        return Failed(rank=rank, text=text)
