"""Rank 0's connection to the rollout engine."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.errors import LinkError, RlhfError, UserInputError
from engine.launch.environment import ROLLOUT_SOCKET_VARIABLE
from engine.protocol import frames, sockets
from engine.protocol.frames import Message
from engine.protocol.rollout_messages import (
    Checksum,
    Continue,
    EngineFailed,
    EngineReady,
    FromEngine,
    Generate,
    Generated,
    LoadWeights,
    Progress,
    Start,
    WeightsLoaded,
    decode_from_engine,
)
from engine.train.rollout.vllm.group import WeightsGroup

log = logging.getLogger("engine")

M = TypeVar("M", bound=FromEngine)
N = TypeVar("N", bound=FromEngine)
Look = Callable[[dict[int, list[int]]], list[int]]
"""Called with the tokens so far by row; returns the rows that have ended."""


class EngineLostError(Exception):
    """The engine ended, or cannot be trusted; a new one may work."""


class RolloutClient:
    """A connection to an engine that the supervisor keeps alive.

    After an error it is closed, and the engine's process ends; the next :meth:`begin` reaches the
    process that the supervisor starts in its place.
    """

    def __init__(self) -> None:
        """Connects to nothing yet."""
        self._sock: socket.socket | None = None
        self.ready: EngineReady | None = None
        """What the present engine reported; None before it has built its model."""
        self.held: LoadWeights | None = None
        """The weights that the present engine has."""
        self.group: WeightsGroup | None = None
        """With its workers, if weights are broadcast to them."""

    @property
    def began(self) -> bool:
        """Whether an engine has been asked to build the model."""
        return self._sock is not None

    def begin(self, start: Start) -> None:
        """Connects and has the engine build the model; does not wait for it.

        The supervisor holds the listening socket, so this works while no engine runs.

        Raises:
            RlhfError: the supervisor offers no engine, or its socket is gone.
        """
        path = os.environ.get(ROLLOUT_SOCKET_VARIABLE)
        if path is None:
            raise RlhfError("rollout.engine is vllm, but no supervisor has started it")
        try:
            self._sock = sockets.connect(Path(path))
            self._sock.settimeout(None)
            self._send(start)
        except OSError as error:
            raise RlhfError(f"the rollout engine's socket cannot be reached: {error}") from error

    def wait_ready(self) -> EngineReady:
        """Waits until the model is built. Raises EngineLostError, UserInputError or RlhfError."""
        if self.ready is None:
            self.ready = self._receive(EngineReady)
            packages = ", ".join(f"{k} {v}" for k, v in self.ready.packages.items())
            log.info("rollout engine: %s (%s) on %s", self.ready.engine, packages,
                     self.ready.device)  # fmt: skip
        return self.ready

    def load(self, update: LoadWeights) -> None:
        """Has the engine replace its weights, and checks what it then holds.

        Raises:
            EngineLostError: it did not, or does not hold what was sent.
        """
        self.begin_load(update)
        self.finish_load(update, update.checksum)

    def begin_load(self, update: LoadWeights) -> None:
        """Has the engine begin to replace its weights. Raises EngineLostError."""
        self.held = None
        self._send(update)

    def finish_load(self, update: LoadWeights, checksum: Checksum | None) -> None:
        """Waits until the engine has the weights, and checks what it holds.

        Args:
            update: what :meth:`begin_load` sent.
            checksum: of all tensors that are not tied.

        Raises:
            EngineLostError: it does not hold what was sent.
        """
        loaded = self._receive(WeightsLoaded)
        if (
            loaded.weights_version != update.weights_version
            or loaded.tensors != len(update.tensors)
            or loaded.checksum not in (None, checksum)
        ):
            self.close()
            raise EngineLostError("the rollout engine does not hold the weights that were sent")
        self.held = update
        log.info(
            "rollout engine: weights of step %d, %d tensors, checksum %016x, loaded in %.2f s",
            loaded.weights_version, loaded.tensors, checksum[0] if checksum else 0, loaded.seconds,
        )  # fmt: skip

    def generate(
        self, request: Generate, look: Look, report: Callable[[int, int], None]
    ) -> Generated:
        """Has the engine generate responses.

        Args:
            request: prompts, uniform numbers and limits.
            look: called regularly, if the request says so.
            report: called regularly with (tokens done, total).

        Raises:
            EngineLostError: it ended, or generated with other weights.
            RlhfError: the request is too large for a message.
        """
        self._send(request)
        while isinstance(message := self._receive_any(Progress, Generated), Progress):
            report(message.done, message.total)
            self._send(Continue(stop=look(message.tokens) if request.look else []))
        if message.weights_version != request.weights_version:
            self.close()
            raise EngineLostError("the rollout engine generated with other weights")
        return message

    def close(self) -> None:
        """Closes the connection, with which the engine's process ends."""
        if self._sock is not None:
            self._sock.close()
        self._sock = self.ready = self.held = self.group = None

    def _send(self, message: Message) -> None:
        if self._sock is None:
            raise EngineLostError("there is no rollout engine")
        try:
            frame = frames.encode(message)
        except LinkError as error:  # another engine could not be sent it either
            self.close()
            raise RlhfError(f"the rollout engine cannot be asked: {error}") from error
        try:
            self._sock.sendall(frame)
        except OSError as error:
            self._fail_with_reason()
            raise EngineLostError(f"the rollout engine is gone: {error}") from error

    def _fail_with_reason(self) -> None:
        """Raises what an engine that is gone has said before; returns if it said nothing."""
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
            raise EngineLostError("there is no rollout engine")
        try:
            return decode_from_engine(frames.receive(self._sock))
        except (OSError, LinkError) as error:
            self.close()
            raise EngineLostError(f"the rollout engine is gone: {error}") from error

    def _error(self, message: FromEngine) -> Exception:
        """The error that a message which was not expected means; closes the connection."""
        self.close()
        if not isinstance(message, EngineFailed):
            return EngineLostError(f"unexpected message of the rollout engine: {message}")
        if message.user_input:
            return UserInputError(message.text)
        return RlhfError(message.text) if message.final else EngineLostError(message.text)
