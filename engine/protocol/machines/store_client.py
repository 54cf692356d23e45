"""A client of the store of a run's first machine (:mod:`engine.launch.store_server`)."""

import time
from collections import deque

import msgspec

from engine.errors import AuthenticationError, LinkError
from engine.protocol.machines.authentication import AuthenticatedConnection, connect
from engine.protocol.machines.store_messages import (
    CheckKeys,
    GetKeys,
    StoreReply,
    StoreRequest,
    decode_reply,
)

PATIENCE = 30.0
"""Seconds to keep trying to connect."""
REPLY_TIMEOUT = 60.0
"""Seconds without a reply after which the first machine counts as gone."""
WAIT_PART = 20.0
"""Seconds that one request waits for keys. A longer wait is several requests, so that the loss of
the first machine is noticed."""
RETRY = 0.5
"""Seconds between two attempts to connect."""


class StoreClient:
    """Sends requests to a store. Thread-safe; simultaneous calls use several connections.

    A connection that breaks is not replaced: the store belongs to one start of the ranks, and
    another store may already listen at its address.
    """

    def __init__(self, address: str, secret: bytes, patience: float = PATIENCE) -> None:
        """Connects.

        Args:
            address: `HOST:PORT` of the first machine.
            secret: of the run.
            patience: seconds to keep trying, because the server may not listen yet.

        Raises:
            LinkError: the store cannot be reached.
            AuthenticationError: it has a different secret.
        """
        self._address, self._secret = address, secret
        # Not a connection for each thread: threads of torch are new ones to Python at every call.
        self._idle: deque[AuthenticatedConnection] = deque()
        self._broken = ""
        self._idle.append(self._connect(patience))

    def request(self, message: StoreRequest, seconds: float = 0.0) -> StoreReply:
        """Sends a request and waits for its reply.

        Args:
            message: the request.
            seconds: the time that it may take besides the timeout for a reply.

        Raises:
            LinkError: the connection is broken, or the request could not be carried out.
        """
        if self._broken:
            raise LinkError(self._broken)
        try:
            connection = self._idle_connection()
            connection.send(msgspec.msgpack.encode(message))
            reply = decode_reply(connection.receive(REPLY_TIMEOUT + seconds))
            self._idle.append(connection)
        except (OSError, LinkError) as error:
            self._broken = f"lost the connection to the first machine of the run: {error}"
            raise LinkError(self._broken) from error
        if reply.error:
            raise LinkError(reply.error)
        return reply

    def wait(self, keys: list[str], seconds: float, *, values: bool = False) -> StoreReply:
        """Waits until all keys exist; on a timeout, `missing` in the reply names a missing key.

        Args:
            keys: to wait for.
            seconds: to wait at most.
            values: whether the reply has their values.

        Raises:
            LinkError: as in :meth:`request`.
        """
        deadline = time.monotonic() + seconds
        while True:
            part = max(0.0, min(WAIT_PART, deadline - time.monotonic()))
            reply = self.request(GetKeys(keys=keys, seconds=part, values=values), part)
            if reply.missing is None or time.monotonic() >= deadline:
                return reply

    def is_alive(self, key: str) -> bool:
        """Whether the store still responds and has a key."""
        try:
            return bool(self.request(CheckKeys(keys=[key])).number)
        except LinkError:
            return False

    def _idle_connection(self) -> AuthenticatedConnection:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect(PATIENCE)

    def _connect(self, patience: float) -> AuthenticatedConnection:
        """Opens a connection. The server may not listen yet, or turn clients away while busy."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return connect(self._address, self._secret)
            except AuthenticationError:
                raise
            except (OSError, LinkError) as error:
                if time.monotonic() > deadline:
                    raise LinkError(f"cannot reach the run at {self._address}: {error}") from error
                time.sleep(RETRY)
