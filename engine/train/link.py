"""A rank's end of the link to its supervisor.

The training loop is synchronous; a reader thread takes in what the supervisor says and the loop
picks it up where it is safe to act. Each rank on the supervisor's machine has a link, for its
phases and its last words; what concerns the run as a whole is said, and heard, by rank 0 alone.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import TypeVar

from engine.errors import LinkError
from engine.launch.environment import SOCKET_VARIABLE, TOKEN_VARIABLE
from engine.protocol import frames, rank_messages, sockets
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Begin, Confirm, Failed, Phase, RankHello, ToRank
from engine.train.rollout.rollout import ReportProgress

M = TypeVar("M", bound=ToRank)
PROGRESS_INTERVAL = 0.2
"""Seconds between progress messages of one phase: a screen shows no more."""


class Link:
    """A connection, from the hello to the end of the process."""

    def __init__(self, rank: int) -> None:
        """Connects and says hello. Raises LinkError when no supervisor answers.

        On another machine than the supervisor's there is none to talk to, and nothing is said.
        """
        self.rank = rank
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[ToRank | None] = queue.SimpleQueue()
        self._sock: socket.socket | None = None
        if SOCKET_VARIABLE not in os.environ:
            return
        # Waited for by the thread that saves, while the loop takes in orders.
        self._confirmed: queue.SimpleQueue[Confirm | None] = queue.SimpleQueue()
        try:
            self._sock = sockets.connect(Path(os.environ[SOCKET_VARIABLE]))
            hello = RankHello(token=os.environ[TOKEN_VARIABLE], rank=rank, pid=os.getpid())
        except (OSError, KeyError) as error:
            raise LinkError(f"rank {rank} cannot reach its supervisor: {error}") from error
        self._sock.settimeout(None)
        threading.Thread(target=self._read, args=(self._sock,), name="link", daemon=True).start()
        self.send(hello)

    def send(self, message: Message) -> None:
        """Sends, whole, from any thread. Raises LinkError when the supervisor is gone."""
        own = isinstance(message, RankHello | Phase | Failed)
        if self._sock is None or (self.rank != 0 and not own):
            return
        try:
            with self._lock:
                self._sock.sendall(frames.encode(message))
        except OSError as error:
            raise LinkError(f"the supervisor is gone: {error}") from error

    def begin(self) -> Begin:
        """Waits for where to start."""
        message = self._next()
        if not isinstance(message, Begin):
            raise LinkError(f"expected begin, got {message}")
        return message

    def confirm(self, step: int) -> None:
        """Waits until the journal holds everything up to `step`; one thread at a time.

        Orders that come meanwhile are left for :meth:`orders`.
        """
        while self._checked(self._confirmed.get()).step != step:
            continue

    def orders(self, wait: float = 0.0) -> list[ToRank]:
        """What has come since the last call; waits up to `wait` seconds for the first."""
        found: list[ToRank] = []
        if wait:
            with contextlib.suppress(queue.Empty):
                found.append(self._checked(self._inbox.get(timeout=wait)))
        while not self._inbox.empty():
            found.append(self._next())
        return found

    def phase(self, step: int, name: str, done: int = 0, total: int = 0) -> ReportProgress:
        """Announces a phase; the result reports its progress."""
        self.send(Phase(rank=self.rank, step=step, name=name, done=done, total=total))
        sent = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal sent
            now = time.monotonic()
            if now - sent >= PROGRESS_INTERVAL:
                sent = now
                self.send(Phase(rank=self.rank, step=step, name=name, done=done, total=total))

        return report

    def _next(self) -> ToRank:
        return self._checked(self._inbox.get())

    @staticmethod
    def _checked(message: M | None) -> M:
        if message is None:
            raise LinkError("the supervisor is gone")
        return message

    def _read(self, sock: socket.socket) -> None:
        try:
            while True:
                message = rank_messages.decode_to_rank(frames.receive(sock))
                if isinstance(message, Confirm):
                    self._confirmed.put(message)
                else:
                    self._inbox.put(message)
        except (OSError, LinkError):
            self._inbox.put(None)
            self._confirmed.put(None)
