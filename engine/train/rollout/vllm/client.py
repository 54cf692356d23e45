"""Rank 0's connection to a rollout engine."""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine.errors import LinkError, RlhfError, UserInputError
from engine.launch.environment import rollout_socket_variable
from engine.protocol import frames, sockets
from engine.protocol.frames import Message
from engine.protocol.rollout.messages import (
    ATTEMPTS,
    Checksum,
    EngineFailed,
    EngineReady,
    FromEngine,
    Generate,
    Generated,
    LoadWeights,
    NextTurns,
    Progress,
    Start,
    WeightsLoaded,
    decode_from_engine,
)
from engine.train.rollout.vllm.group import WeightsGroup

log = logging.getLogger("engine")

M = TypeVar("M", bound=FromEngine)
N = TypeVar("N", bound=FromEngine)


class EngineLostError(Exception):
    """The engine ended or cannot be trusted; a new one may work."""


def raise_first(errors: Sequence[Exception]) -> None:
    """Raises one error for several engines: one that ends the run, or that engines are lost.

    Raises:
        EngineLostError: all errors are of this type; contains their reasons.
        Exception: the first error of another type.
    """
    for error in errors:
        if not isinstance(error, EngineLostError):
            raise error
    if errors:
        raise EngineLostError("; ".join(map(str, errors)))


class RolloutClient:
    """A connection to an engine that the supervisor keeps alive.

    After an error it is closed, which ends the engine's process. The next :meth:`begin` reaches the
    process that the supervisor starts in its place. Different threads may use different clients;
    only one thread at a time may use a client.
    """

    def __init__(self, engine: int = 0, engines: int = 1) -> None:
        """Connects to nothing yet.

        Args:
            engine: the number of the engine, from 0.
            engines: how many there are.
        """
        self._engine = engine
        self.name = "rollout engine" if engines == 1 else f"rollout engine {engine}"
        self._the_engine = f"the {self.name}" if engines == 1 else self.name
        self.failures = 0
        """Number of processes lost in a row; callers reset it to 0 when they start something
        new."""
        self._sock: socket.socket | None = None
        self.ready: EngineReady | None = None
        """The current engine's report; None before it has built its model."""
        self.held: LoadWeights | None = None
        """The weights that the current engine holds."""
        self.group: WeightsGroup | None = None
        """The group with the engine's workers, if weights are broadcast to them."""

    @property
    def began(self) -> bool:
        """Whether an engine has been asked to build the model."""
        return self._sock is not None

    def begin(self, start: Start) -> None:
        """Connects and tells the engine to build the model; does not wait for it.

        The supervisor holds the listening socket, so this works while no engine runs.

        Raises:
            RlhfError: the supervisor offers no engine, or its socket is gone.
        """
        path = os.environ.get(rollout_socket_variable(self._engine))
        if path is None:
            raise RlhfError("rollout.engine is vllm, but no supervisor has started it")
        try:
            self._sock = sockets.connect(Path(path))
            self._sock.settimeout(None)
            self._send(start)
        except OSError as error:
            raise RlhfError(f"{self._the_engine}'s socket cannot be reached: {error}") from error

    def wait_ready(self) -> None:
        """Waits until the model is built. Raises EngineLostError, UserInputError or RlhfError."""
        if self.ready is None:
            self.ready = self._receive(EngineReady)
            packages = ", ".join(f"{k} {v}" for k, v in self.ready.packages.items())
            log.info("%s: %s (%s) on %s", self.name, self.ready.engine, packages,
                     self.ready.device)  # fmt: skip

    def load(self, update: LoadWeights) -> None:
        """Makes the engine replace its weights, and checks the result.

        Raises:
            EngineLostError: it failed, or does not hold what was sent.
        """
        self.begin_load(update)
        self.finish_load(update, update.checksum)

    def begin_load(self, update: LoadWeights) -> None:
        """Tells the engine to start replacing its weights. Raises EngineLostError."""
        self.held = None
        self._send(update)

    def finish_load(self, update: LoadWeights, checksum: Checksum | None) -> None:
        """Waits until the engine has the weights, and verifies them.

        Args:
            update: what :meth:`begin_load` sent.
            checksum: the checksum of all tensors that are not tied.

        Raises:
            EngineLostError: it does not hold what was sent.
        """
        loaded = self._receive(WeightsLoaded)
        if (
            loaded.weights_version != update.weights_version
            or loaded.tensors != len(update.tensors)
            or loaded.checksum not in (None, checksum)
        ):
            raise self.lost(f"{self._the_engine} does not hold the weights that were sent")
        self.held = update
        log.info(
            "%s: weights of step %d, %d tensors, checksum %016x, loaded in %.2f s",
            self.name, loaded.weights_version, loaded.tensors, checksum[0] if checksum else 0,
            loaded.seconds,
        )  # fmt: skip

    def has_replied_or_ended(self) -> bool:
        """Whether there is a message to receive or the connection has ended; does not wait."""
        if self._sock is None:
            return True
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def generate(self, request: Generate, exchange: Callable[[Progress], NextTurns]) -> None:
        """Makes the engine generate turns of responses until there are no more.

        Args:
            request: what all turns have in common.
            exchange: called with each message of the engine; returns the reply.

        Raises:
            EngineLostError: it ended, or generated with other weights.
            RlhfError: the turns are too large for a message.
        """
        self._send(request)
        while isinstance(message := self._receive_any(Progress, Generated), Progress):
            if message.weights_version != request.weights_version:
                raise self.lost(f"{self._the_engine} generates with other weights")
            self._send(exchange(message))

    def lost(self, reason: str) -> EngineLostError | RlhfError:
        """Closes the connection to a lost engine and returns the error to raise.

        Returns:
            EngineLostError, or RlhfError if it is the last of :data:`ATTEMPTS`.
        """
        self.close()
        self.failures += 1
        log.warning("%s, attempt %d of %d: %s", self.name, self.failures, ATTEMPTS, reason)
        if self.failures < ATTEMPTS:
            return EngineLostError(reason)
        return RlhfError(f"{ATTEMPTS} rollout engines in a row failed, the last one with: {reason}")

    def close(self) -> None:
        """Closes the connection, which ends the engine's process."""
        if self._sock is not None:
            self._sock.close()
        self._sock = self.ready = self.held = self.group = None

    def _send(self, message: Message) -> None:
        if self._sock is None:
            raise self.lost(f"there is no {self.name}")
        try:
            frame = frames.encode(message)
        except LinkError as error:  # no other engine could be sent it either
            self.close()
            raise RlhfError(f"{self._the_engine} cannot be asked: {error}") from error
        try:
            self._sock.sendall(frame)
        except OSError as error:
            self._fail_with_reason()
            raise self.lost(f"{self._the_engine} is gone: {error}") from error

    def _fail_with_reason(self) -> None:
        """Raises the error that an engine reported before it ended, if there is one."""
        message = self._next()
        if isinstance(message, EngineFailed):
            raise self._error(message)

    def _receive(self, kind: type[M]) -> M:
        message = self._next()
        if isinstance(message, kind):
            return message
        raise self._error(message)

    def _receive_any(self, first: type[M], second: type[N]) -> M | N:
        message = self._next()
        if isinstance(message, first | second):
            return message
        raise self._error(message)

    def _next(self) -> FromEngine:
        if self._sock is None:
            raise self.lost(f"there is no {self.name}")
        try:
            return decode_from_engine(frames.receive(self._sock))
        except (OSError, LinkError) as error:
            raise self.lost(f"{self._the_engine} is gone: {error}") from error

    def _error(self, message: FromEngine) -> Exception:
        """Closes the connection and returns the error that an unexpected message stands for."""
        if not isinstance(message, EngineFailed):
            return self.lost(f"unexpected message of {self._the_engine}: {message}")
        if not message.user_input and not message.final:
            return self.lost(message.text or "no reason given")
        self.close()
        return UserInputError(message.text) if message.user_input else RlhfError(message.text)
