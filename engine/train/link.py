"""A rank's connection to the supervisor.

A reader thread receives messages; the synchronous training loop takes them when it is safe to act.
Each rank on the supervisor's machine has a connection, over which it reports its phases and errors.
Everything that concerns the run as a whole is sent and received by rank 0 alone.
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
from engine.progress import ReportProgress
from engine.protocol import frames, rank_messages, sockets
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Begin, Confirm, Failed, Phase, RankHello, ToRank

M = TypeVar("M", bound=ToRank)
PROGRESS_INTERVAL = 0.2
"""Minimum seconds between progress messages of a phase; the TUI does not refresh faster."""


class SupervisorEndedError(LinkError):
    """The connection to the supervisor has ended: the engine was killed."""


class Link:
    """A connection to the supervisor, open until the process ends."""

    def __init__(self, rank: int) -> None:
        """Connects and sends :class:`RankHello`.

        On a machine without a supervisor nothing is connected, and :meth:`send` does nothing.

        Raises:
            LinkError: the supervisor does not accept the connection.
        """
        self.rank = rank
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[ToRank | None] = queue.SimpleQueue()
        self._sock: socket.socket | None = None
        if SOCKET_VARIABLE not in os.environ:
            return
        # Separate from the inbox: the saving thread waits on it while the loop takes commands.
        self._confirmed: queue.SimpleQueue[Confirm | None] = queue.SimpleQueue()
        try:
            self._sock = sockets.connect(Path(os.environ[SOCKET_VARIABLE]))
            hello = RankHello(token=os.environ[TOKEN_VARIABLE], rank=rank)
        except (OSError, KeyError) as error:
            raise LinkError(f"rank {rank} cannot reach its supervisor: {error}") from error
        self._sock.settimeout(None)
        threading.Thread(target=self._read, args=(self._sock,), name="link", daemon=True).start()
        self.send(hello)

    def send(self, message: Message) -> None:
        """Sends a message; any thread may call it.

        A rank other than 0 sends only its hello, phases and errors; other messages are dropped, so
        that all ranks can run the same code.

        Raises:
            SupervisorEndedError: the connection has ended.
        """
        sent_by_all = isinstance(message, RankHello | Phase | Failed)
        if self._sock is None or (self.rank != 0 and not sent_by_all):
            return
        try:
            with self._lock:
                self._sock.sendall(frames.encode(message))
        except OSError as error:
            raise SupervisorEndedError(f"the supervisor has ended: {error}") from error

    def wait_for_begin(self) -> Begin:
        """Blocks until the supervisor sends the step to start from. Raises LinkError."""
        message = self._next()
        if not isinstance(message, Begin):
            raise LinkError(f"expected begin, got {message}")
        return message

    def wait_for_confirm(self, step: int, at_most: float | None = None) -> Confirm | None:
        """Blocks until the journal holds everything up to `step`. Raises LinkError.

        One thread may wait at a time. Commands that arrive meanwhile stay in :meth:`commands`.

        Args:
            step: the step.
            at_most: give up after this many seconds without any confirmation.

        Returns:
            The confirmation; None if it has not arrived.
        """
        try:
            while True:
                confirm = self._checked(self._confirmed.get(timeout=at_most))
                if confirm.step == step:
                    return confirm
        except queue.Empty:
            return None

    def commands(self, wait: float = 0.0) -> list[ToRank]:
        """Returns the messages received since the last call. Raises LinkError.

        Args:
            wait: seconds to block if there is none.
        """
        received: list[ToRank] = []
        if wait:
            with contextlib.suppress(queue.Empty):
                received.append(self._checked(self._inbox.get(timeout=wait)))
        while not self._inbox.empty():
            received.append(self._next())
        return received

    def phase(self, step: int, name: str, done: int = 0, total: int = 0) -> ReportProgress:
        """Reports that a phase begins; returns a function that reports its progress."""
        self.send(Phase(rank=self.rank, step=step, name=name, done=done, total=total))
        last_sent = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last_sent
            now = time.monotonic()
            if now - last_sent >= PROGRESS_INTERVAL:
                last_sent = now
                self.send(Phase(rank=self.rank, step=step, name=name, done=done, total=total))

        return report

    def _next(self) -> ToRank:
        return self._checked(self._inbox.get())

    @staticmethod
    def _checked(message: M | None) -> M:
        if message is None:
            raise SupervisorEndedError("the supervisor has ended")
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
            # None wakes any waiting thread: the connection has ended.
            self._inbox.put(None)
            self._confirmed.put(None)
