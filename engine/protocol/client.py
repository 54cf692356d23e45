"""A client of a live engine: sends commands, waits for their replies, and follows events.

Calls block; the TUI makes them in threads. A connection serves one purpose: use one for commands
and another for :meth:`Client.watch`.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from engine.errors import LinkError, NoSuchSessionError, RefusedByEngineError
from engine.protocol import frames, sockets
from engine.protocol.client_messages import (
    ClientHello,
    CommandReply,
    CommandRequest,
    JournalAdvanced,
    Status,
    StatusRequest,
    Telemetry,
    ToClient,
    Watch,
    WatchRefused,
    Welcome,
    decode_to_client,
)
from engine.protocol.commands import Command
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Phase
from engine.session.folder import SessionFolder

T = TypeVar("T")

REPLY_TIMEOUT = 5.0
"""Seconds to wait for a reply that does not depend on a training step."""


class Client:
    """A connection to the engine of one session."""

    def __init__(self, session: SessionFolder, who: str, timeout: float = REPLY_TIMEOUT) -> None:
        """Connects.

        Args:
            session: the session whose engine to connect to.
            who: the operator, for the journal.
            timeout: seconds to wait for each reply that does not depend on a training step.

        Raises:
            NoSuchSessionError: the session has no live engine on this machine, or one that cannot
                be reached yet.
            LinkError: the engine does not reply.
            RefusedByEngineError: its protocol has another version.
            SessionError: the session belongs to another user, and this user is not root.
        """
        # engine.json names the socket, so its author must be trusted. The server accepts root, too.
        session.check_owner(allow_root=True)
        self._session = session
        self._who = who
        self._timeout = timeout
        self._connect()

    def _connect(self) -> None:
        session = self._session
        if not session.is_live():
            raise NoSuchSessionError(
                f"session '{session.name}' has no live engine; start one with: "
                f"{session.command('resume')}"
            )
        engine = session.engine()
        if engine is None:
            raise NoSuchSessionError(
                f"the engine of '{session.name}' is just starting or ending: try again"
            )
        path = Path(engine.socket)
        if not sockets.may_be_of(session.folder, path):
            raise NoSuchSessionError(self._elsewhere())
        try:
            self._sock = sockets.connect(path, self._timeout)
            self._send(ClientHello(who=self._who))
            welcome = self._receive()
        except OSError as error:
            if engine.host != socket.gethostname():  # not before: this machine may have a new name
                raise NoSuchSessionError(
                    f"the engine of '{session.name}' runs on {engine.host}: send commands from "
                    "there"
                ) from error
            raise LinkError(f"the engine of '{session.name}' does not reply: {error}") from error
        if isinstance(welcome, Welcome) and welcome.refused:
            raise RefusedByEngineError(
                f"the engine of '{session.name}' refuses the connection: {welcome.refused}"
            )
        if not isinstance(welcome, Welcome) or welcome.version != frames.VERSION:
            raise RefusedByEngineError(
                f"the engine of '{session.name}' uses another version of the protocol; use the "
                f"rlhf-tui that started it, or end it by kill {engine.pid}, which saves, and "
                "resume it with this one"
            )
        if welcome.pid != engine.pid:
            self._sock.close()
            raise NoSuchSessionError(self._elsewhere())
        self.pid = welcome.pid

    def _elsewhere(self) -> str:
        """Why a command is not sent: it would reach the engine of another session."""
        name = self._session.name
        return (
            f"session '{name}' was moved or copied while an engine ran: its engine is just "
            "starting or ending, try again"
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the engine continues."""
        self._sock.close()

    def send(self, command: Command, command_id: str | None = None) -> CommandReply:
        """Sends a command and returns the first reply: accepted, applied or rejected.

        Args:
            command: what to do.
            command_id: a repeated id has no further effect. Default: a new one.

        Raises:
            NoSuchSessionError: the engine has ended.
            LinkError: the engine does not reply.
        """
        # Callers know a command by its base class only.
        request = CommandRequest(id=command_id or new_id(), command=command)  # type: ignore[arg-type]  # every Command is an AnyCommand

        def ask() -> CommandReply:
            self._send(request)
            return self._reply(request.id, time.monotonic() + self._timeout)

        return self._ask_twice(ask)

    def _ask_twice(self, ask: Callable[[], T]) -> T:
        """Asks, and once more on a new connection if the engine closed this one for others."""
        try:
            try:
                return ask()
            except LinkError:
                self._sock.close()
                self._connect()
                return ask()
        except TimeoutError as error:
            raise LinkError(f"the engine of '{self._session.name}' does not reply") from error

    def wait(self, command_id: str, timeout: float | None = None) -> CommandReply:
        """Waits until a command is applied or rejected, at most `timeout` seconds.

        Use :func:`engine.journal.last_reply.last_reply`, which needs no connection to the end.

        Raises:
            TimeoutError: it is still pending.
            LinkError: the engine is gone, or closed this connection for others.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (reply := self._reply(command_id, deadline)).final:
            continue
        return reply

    def status(self) -> Status:
        """The engine's current status. Raises what :meth:`send` does."""

        def ask() -> Status:
            self._send(StatusRequest())
            while not isinstance(message := self._receive(), Status):
                continue
            return message

        return self._ask_twice(ask)

    def watch(self) -> Iterator[JournalAdvanced | Phase | Telemetry]:
        """Yields events as they occur; ends when the connection does.

        Raises:
            RefusedByEngineError: too many clients watch.
            LinkError: the engine is gone.
        """
        self._send(Watch())
        self._sock.settimeout(None)
        while True:
            try:
                message = self._receive()
            except (OSError, LinkError):
                return
            if isinstance(message, WatchRefused):
                raise RefusedByEngineError(message.reason)
            if isinstance(message, JournalAdvanced | Phase | Telemetry):
                yield message

    def _reply(self, command_id: str, deadline: float | None) -> CommandReply:
        while True:
            remaining = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._sock.settimeout(remaining)
            message = self._receive()
            if isinstance(message, CommandReply) and message.id == command_id:
                return message

    def _send(self, message: Message) -> None:
        try:
            self._sock.sendall(frames.encode(message))
        except OSError as error:
            raise LinkError(f"the engine of '{self._session.name}' is gone: {error}") from error

    def _receive(self) -> ToClient:
        try:
            return decode_to_client(frames.receive(self._sock))
        except ConnectionError as error:
            raise LinkError(
                f"the engine of '{self._session.name}' closed the connection"
            ) from error


def new_id() -> str:
    """A unique id for a command."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
