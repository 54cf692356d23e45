"""The supervisor's socket: who may connect, what a connection may cost, who is watching.

A connection that is malformed, oversized, slow or abandoned is closed; it never costs the training
anything but a line in the log.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from engine import __version__
from engine.errors import LinkError
from engine.protocol import frames, sockets
from engine.protocol.client_messages import (
    ClientHello,
    CommandReply,
    CommandRequest,
    FromClient,
    JournalAdvanced,
    Status,
    StatusRequest,
    Telemetry,
    Watch,
    Welcome,
    decode_from_client,
)
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Phase, RankHello

log = logging.getLogger("engine")

HELLO_TIMEOUT = 5.0
"""Seconds within which a connection says who it is."""
FRAME_TIMEOUT = 10.0
"""Seconds from a client's frame's first byte to its last."""
MAX_CLIENT_FRAME = 256 * 1024
MAX_CLIENTS = 64
MAX_UNREAD = 4 * 1024 * 1024
"""Bytes that may wait for a client that does not read; then it is cut off."""
WAKE_INTERVAL = 0.1
"""Seconds: wake-ups in between are merged, the journal holds them all."""

_hello = msgspec.msgpack.Decoder(RankHello | ClientHello)


class Connection:
    """One client."""

    def __init__(self, writer: asyncio.StreamWriter, who: str) -> None:
        self._writer = writer
        self.who = who
        self.watching = False
        self.awaited: set[str] = set()
        """Ids of the commands whose answers go here."""

    def send(self, message: Message) -> None:
        """Queues a frame; a client that does not read is cut off."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            log.warning("%s does not read: connection cut", self.who)
            self._writer.transport.abort()
            return
        self._writer.write(frames.encode(message))


class RequestHandler(Protocol):
    """What the server asks of the supervisor."""

    def answer(self, request: CommandRequest, who: str) -> CommandReply:
        """Takes a command in."""

    def status(self) -> Status:
        """How things stand."""

    def wake(self) -> JournalAdvanced:
        """How far the journal is."""


RankConversation = Callable[
    [RankHello, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]


class Server:
    """Serves ranks and clients on one socket."""

    def __init__(self) -> None:
        self._clients: set[Connection] = set()
        self._wake_due: asyncio.TimerHandle | None = None

    async def start(
        self, listener: socket.socket, engine: RequestHandler, rank_conversation: RankConversation
    ) -> None:
        """Begins to accept."""
        self._engine = engine
        self._rank_conversation = rank_conversation
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)

    def close(self) -> None:
        """Hangs up on everyone."""
        if self._wake_due is not None:
            self._wake_due.cancel()
            self._send_wake()
        self._server.close()

    @property
    def watchers(self) -> int:
        """How many are looking."""
        return sum(c.watching for c in self._clients)

    def tell(self, answer: CommandReply) -> None:
        """An answer, to everyone who asked for it."""
        for client in self._clients:
            if answer.id in client.awaited:
                client.send(answer)
                if answer.final:
                    client.awaited.discard(answer.id)

    def show(self, message: Phase | Telemetry) -> None:
        """Something fleeting, to everyone who watches."""
        for client in self._clients:
            if client.watching:
                client.send(message)

    def wake(self) -> None:
        """The journal has new rows; watchers hear of it within :data:`WAKE_INTERVAL`."""
        if self._wake_due is None:
            loop = asyncio.get_running_loop()
            self._wake_due = loop.call_later(WAKE_INTERVAL, self._send_wake)

    def _send_wake(self) -> None:
        self._wake_due = None
        if watching := [c for c in self._clients if c.watching]:
            message = self._engine.wake()
            for client in watching:
                client.send(message)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._admit(reader, writer)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                log.info("a connection ended in the middle of a frame")
        except (LinkError, TimeoutError, ConnectionError) as error:
            log.info("a connection was closed: %s", str(error) or type(error).__name__)
        except (msgspec.DecodeError, RecursionError) as error:
            log.warning("a connection spoke no protocol of ours: %s", error)
        except asyncio.CancelledError:
            pass  # The engine ends. asyncio would log a cancelled handler with its traceback.
        finally:
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = sockets.peer_uid(writer.get_extra_info("socket"))
        if uid not in (os.getuid(), 0):
            log.warning("turned away a connection of uid %s", uid)
            return
        body = await asyncio.wait_for(receive(reader, MAX_CLIENT_FRAME), HELLO_TIMEOUT)
        hello = _hello.decode(body)
        if isinstance(hello, RankHello):
            await self._rank_conversation(hello, reader, writer)
            return
        await self._converse(reader, Connection(writer, hello.who), hello.version)

    async def _converse(
        self, reader: asyncio.StreamReader, client: Connection, version: int
    ) -> None:
        client.send(Welcome(pid=os.getpid(), software=__version__))
        if version != frames.VERSION or len(self._clients) >= MAX_CLIENTS:
            return
        self._clients.add(client)
        try:
            while True:
                header = await reader.readexactly(frames.HEADER.size)
                body = await asyncio.wait_for(
                    _body(reader, header, MAX_CLIENT_FRAME), FRAME_TIMEOUT
                )
                self._handle(client, decode_from_client(body))
        finally:
            self._clients.discard(client)

    def _handle(self, client: Connection, message: FromClient) -> None:
        match message:
            case CommandRequest():
                client.awaited.add(message.id)
                answer = self._engine.answer(message, client.who)
                client.send(answer)
                if answer.final:
                    client.awaited.discard(message.id)
            case StatusRequest():
                client.send(self._engine.status())
            case Watch():
                client.watching = True
                client.send(self._engine.wake())
            case ClientHello():
                raise LinkError("a second hello on one connection")


async def receive(reader: asyncio.StreamReader, limit: int = frames.MAX_FRAME) -> bytes:
    """One frame's body. Raises LinkError when it is over the limit."""
    return await _body(reader, await reader.readexactly(frames.HEADER.size), limit)


async def _body(reader: asyncio.StreamReader, header: bytes, limit: int) -> bytes:
    return await reader.readexactly(frames.frame_length(header, limit))
