"""The supervisor's socket: accepts ranks and clients, and limits what a connection may cost.

A connection that is malformed, oversized, slow or abandoned is closed. Its only effect is a line in
the log.
"""

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

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
    WatchRefused,
    Welcome,
    decode_from_client,
)
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Phase, RankHello
from engine.supervisor.watchers import Watchers

log = logging.getLogger("engine")

HELLO_TIMEOUT = 5.0
"""Seconds from the start of a connection to its first frame."""
FRAME_TIMEOUT = 10.0
"""Seconds from the first to the last byte of a client's frame."""
CLOSE_TIMEOUT = 10.0
"""Seconds for a client to read what was queued for it when its connection is closed."""
MAX_CLIENT_FRAME = 256 * 1024
MAX_WATCHERS = 64
MAX_CLIENTS = 64
"""Maximum number of clients that do not watch. For one more, the oldest is closed: whoever wants to
stop a run must get through, however many connections others have left open."""
FRESH_SECONDS = 1.0
"""Seconds for which a new connection is not closed for others: a command may be on its way."""
MAX_FRESH = 256
"""Maximum number of clients that do not watch if many connect within :data:`FRESH_SECONDS`."""
MAX_UNREAD = 4 * 1024 * 1024
"""Bytes that may be queued for a client that does not read; beyond that, it is disconnected."""
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of `accept` after which asyncio tries again, each second."""
ACCEPT_LOG_INTERVAL = 60.0
"""Seconds between two lines of the log while no connection can be accepted."""

_decode_hello: Callable[[bytes], RankHello | ClientHello] = frames.decoder(
    RankHello | ClientHello, "a first message"
)


class Connection:
    """One client's connection."""

    def __init__(self, writer: asyncio.StreamWriter, who: str, known: int) -> None:
        self._writer = writer
        self.who = who
        self.since = asyncio.get_running_loop().time()
        """When it connected, on the loop's clock."""
        self.known = known
        """Number of the newest state when it connected. Replies to its requests include that."""
        self.awaited: set[str] = set()
        """Ids of the commands whose replies go to this client."""

    def is_behind(self) -> bool:
        """Whether it has not yet read everything that was sent."""
        return self._writer.transport.get_write_buffer_size() > 0

    def close(self) -> None:
        """Closes the connection, see :func:`close`."""
        close(self._writer)

    def send(self, message: Message) -> None:
        """Queues a message, see :meth:`send_frame`."""
        self.send_frame(frames.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queues a frame, or closes the connection of a client that does not read."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            log.warning("%s does not read: connection closed", self.who)
            self._writer.transport.abort()
            return
        self._writer.write(frame)


class CommandReceiver(Protocol):
    """Receives the commands of clients."""

    def handle(self, request: CommandRequest, who: str) -> CommandReply:
        """Accepts or rejects a command."""


class StatusSource(Protocol):
    """Provides the information that clients request."""

    def status(self) -> Status:
        """The session's current status."""

    def journal_position(self) -> JournalAdvanced:
        """The newest rows of the journal."""


RankConnectionHandler = Callable[
    [RankHello, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]


class Server:
    """Serves ranks and clients on one socket."""

    def __init__(self) -> None:
        self._clients: dict[Connection, None] = {}
        """All of them, in the order in which they came."""
        self._watchers = Watchers(self._journal_position)
        self._accept_logged: float | None = None
        """When it was last logged that no connection can be accepted, on the loop's clock."""

    async def start(
        self,
        listener: socket.socket,
        commands: CommandReceiver,
        source: StatusSource,
        handle_rank: RankConnectionHandler,
    ) -> None:
        """Begins to accept connections.

        Args:
            listener: a bound Unix socket.
            commands: receives the commands of clients.
            source: provides status messages and the newest rows.
            handle_rank: runs a rank's connection until it ends.
        """
        self._commands, self._source = commands, source
        self._handle_rank = handle_rank
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)

    def close(self) -> None:
        """Sends watchers the last news and stops accepting connections."""
        self._watchers.close()
        self._server.close()

    @property
    def watchers(self) -> int:
        """The number of clients that watch."""
        return len(self._watchers)

    def send_reply(self, reply: CommandReply) -> None:
        """Sends a reply to every client that sent the command."""
        for client in self._clients:
            if reply.id in client.awaited:
                client.send(reply)
                if reply.final:
                    client.awaited.discard(reply.id)

    def send_to_watchers(self, message: Phase | Telemetry) -> None:
        """Sends watchers a message that is not in the journal, see :meth:`Watchers.set_state`."""
        self._watchers.set_state(message)

    def notify_watchers(self, *, soon: bool = True) -> None:
        """Announces new rows of the journal, see :meth:`Watchers.rows_added`."""
        self._watchers.rows_added(soon=soon)

    def _journal_position(self) -> JournalAdvanced:
        return self._source.journal_position()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs an error that asyncio itself has caught.

        While no file can be opened, asyncio calls `accept` a hundred times a second and reports
        each error: one line in :data:`ACCEPT_LOG_INTERVAL` seconds says the same. Everything else
        is logged as by default, with its traceback.
        """
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NO_RESOURCES and "socket" in context):
            loop.default_exception_handler(context)
            return
        now, logged = loop.time(), self._accept_logged
        if logged is None or now - logged >= ACCEPT_LOG_INTERVAL:
            self._accept_logged = now
            text = f"cannot accept connections: {error.strerror}; trying again every second"
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if error.errno == errno.EMFILE and soft != hard:
                text += f"; to allow more: prlimit --pid {os.getpid()} --nofile={hard}"
            log.warning(text)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve_peer(reader, writer)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                log.info("a connection ended within a frame")
        except (LinkError, TimeoutError) as error:
            log.info("a connection was closed: %s", str(error) or type(error).__name__)
        except ConnectionError as error:  # a client was killed, which is no event of the run
            log.debug("a connection was lost: %s", error)
        except asyncio.CancelledError:
            return  # The engine ends. asyncio would log a cancelled handler with its traceback.
        finally:
            close(writer)

    async def _serve_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = sockets.peer_uid(writer.get_extra_info("socket"))
        if uid not in (os.getuid(), 0):
            log.warning("refused a connection of uid %s", uid)
            return
        body = await asyncio.wait_for(receive(reader, MAX_CLIENT_FRAME), HELLO_TIMEOUT)
        hello = _decode_hello(body)
        if isinstance(hello, RankHello):
            await self._handle_rank(hello, reader, writer)
            return
        client = Connection(writer, hello.who, self._watchers.number)
        await self._serve_client(reader, client, hello.version)

    async def _serve_client(
        self, reader: asyncio.StreamReader, client: Connection, version: int
    ) -> None:
        client.send(Welcome(pid=os.getpid(), software=__version__))
        if version != frames.VERSION:
            return
        self._make_room()
        self._clients[client] = None
        try:
            while True:
                header = await reader.readexactly(frames.HEADER.size)
                body = await asyncio.wait_for(
                    _body(reader, header, MAX_CLIENT_FRAME), FRAME_TIMEOUT
                )
                self._handle(client, decode_from_client(body))
        finally:
            self._clients.pop(client, None)
            self._watchers.discard(client)

    def _make_room(self) -> None:
        """Closes connections if there are too many, starting with those that await no reply.

        Their commands are still carried out. Clients then read the outcome from the journal
        (:mod:`engine.journal.last_reply`).
        """
        others = [client for client in self._clients if client not in self._watchers]
        fresh = asyncio.get_running_loop().time() - FRESH_SECONDS
        while len(others) >= MAX_CLIENTS:
            oldest = min(others, key=lambda client: bool(client.awaited))
            if oldest.since > fresh and len(others) < MAX_FRESH:
                break
            log.warning("%s: connection closed, since %d are open", oldest.who, len(others))
            others.remove(oldest)
            del self._clients[oldest]
            oldest.close()

    def _watch(self, client: Connection) -> None:
        if len(self._watchers) >= MAX_WATCHERS and client not in self._watchers:
            reason = f"{MAX_WATCHERS} viewers are connected already, the limit: close one of them"
            client.send(WatchRefused(reason=reason))
            client.close()
        else:
            self._watchers.add(client, client.known)

    def _handle(self, client: Connection, message: FromClient) -> None:
        match message:
            case CommandRequest():
                client.awaited.add(message.id)
                reply = self._commands.handle(message, client.who)
                client.send(reply)
                if reply.final:
                    client.awaited.discard(message.id)
            case StatusRequest():
                client.send(self._source.status())
            case Watch():
                self._watch(client)
            case ClientHello():
                raise LinkError("a second hello on one connection")


def close(writer: asyncio.StreamWriter) -> None:
    """Closes a connection once its queue is sent, or after :data:`CLOSE_TIMEOUT`.

    asyncio alone would keep the connection and the queue of a client that never reads.
    """
    writer.close()
    if writer.transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, writer.transport.abort)


async def receive(reader: asyncio.StreamReader, limit: int = frames.MAX_FRAME) -> bytes:
    """Reads the body of one frame.

    Raises:
        LinkError: the frame is larger than `limit`.
        asyncio.IncompleteReadError: the connection ended.
    """
    return await _body(reader, await reader.readexactly(frames.HEADER.size), limit)


async def _body(reader: asyncio.StreamReader, header: bytes, limit: int) -> bytes:
    return await reader.readexactly(frames.frame_length(header, limit))
