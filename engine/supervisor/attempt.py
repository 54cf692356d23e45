"""One start of the ranks, as their supervisor sees it: who talks, who failed, and why it ended."""

import asyncio
import contextlib
import signal
import time

import msgspec

from engine.config.schema import LaunchConfig
from engine.launch.start import StartOptions
from engine.protocol import frames
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Ended, Failed

DRAIN_TIMEOUT = 10.0
"""Seconds for what dead ranks said last to be read."""


class Attempt:
    """What has been heard of an attempt's ranks."""

    def __init__(self, start: StartOptions) -> None:
        self.start = start
        self.failure: Failed | None = None
        """Why it fails, by the best word there is."""
        self.ended: Ended | None = None
        """That it ended as it should."""
        self.ready = False
        """Whether everything was loaded: before that, its ranks have carried out no command."""
        self._lead: asyncio.StreamWriter | None = None
        self._talking: set[int] = set()
        self._silent = asyncio.Event()
        self._explained: set[int] = set()
        self._gone: list[int] = []  # without a last word, in order

    def is_heard(self, rank: int) -> bool:
        """Whether a rank's link is open."""
        return rank in self._talking

    def opened(self, rank: int, writer: asyncio.StreamWriter) -> None:
        """A rank has said hello; commands go to rank 0."""
        self._talking.add(rank)
        if rank == 0:
            self._lead = writer

    def send(self, message: Message) -> None:
        """Says something to rank 0, if it is there."""
        if self._lead is not None and not self._lead.is_closing():
            self._lead.write(frames.encode(message))

    def failed(self, word: Failed) -> None:
        """A rank's last words; the first that is no echo of another's end counts."""
        self._explained.add(word.rank)
        if self.failure is None or (self.failure.echo and not word.echo):
            self.failure = word

    def closed(self, rank: int) -> None:
        """A rank has hung up."""
        self._talking.discard(rank)
        if not self._talking:
            self._silent.set()
        # The echo of its end, from another rank, may have been read before this.
        if self.ended is None and rank not in self._explained:
            self._gone.append(rank)

    async def silence(self) -> None:
        """Waits for the links to be closed: the last words may still lie in the sockets."""
        if self._talking:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._silent.wait(), DRAIN_TIMEOUT)

    @property
    def failed_by_itself(self) -> bool:
        """Whether a rank said more than that the others are gone."""
        return self.failure is not None and not self.failure.echo

    def cause(self, status: int, launch: LaunchConfig, name: str) -> Failed:
        """Why it ended otherwise than it should.

        What a rank said before it failed comes first; what the others noticed of it counts less.

        Args:
            status: of the process that was started.
            launch: how it was.
            name: the session's.
        """
        failure = self.failure
        if failure is not None and not failure.echo:
            return failure
        if failure is not None and not self._gone:
            if launch.nodes == 1:  # a rank hangs, and the others have waited for launch.timeout
                return failure
            text = f"the ranks of another machine are gone ({failure.text}); start them there with"
            text += f": rlhf-tui join {launch.rendezvous}"
            return msgspec.structs.replace(failure, text=text)
        rank = self._gone[0] if self._gone else 0
        text = f"rank {rank} {describe_exit(status)}; see rlhf-tui logs {name}"
        return Failed(rank=rank, text=text)


class StepTimer:
    """How long a step takes lately, and how far the one in hand may be."""

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        """None before the first step is done."""
        self.restart()

    def restart(self) -> None:
        """A step begins now."""
        self._began = time.monotonic()

    def step(self, measured: float | None = None) -> None:
        """A step is done, and the next one begins; `measured` in place of the clock's seconds."""
        taken = time.monotonic() - self._began if measured is None else measured
        self.restart()
        before = self.step_seconds
        self.step_seconds = taken if before is None else 0.7 * before + 0.3 * taken

    def left(self) -> float | None:
        """Seconds until the step in hand is done, reckoned."""
        if self.step_seconds is None:
            return None
        return max(0.0, self.step_seconds - (time.monotonic() - self._began))


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
