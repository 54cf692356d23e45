"""A client of a running engine: send a command, await what becomes of it, watch.

Blocking; a TUI uses it from a thread worker. One connection is one conversation: use one for
commands and another one for watching.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from engine.errors import LinkError, NoSuchSessionError
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
    Welcome,
    decode_to_client,
)
from engine.protocol.commands import Command
from engine.protocol.frames import Message
from engine.protocol.rank_messages import Phase
from engine.session.folder import Session

REPLY_TIMEOUT = 5.0
"""Seconds for an answer that needs no step."""


class Client:
    """A connection to the engine of one session."""

    def __init__(self, session: Session, who: str) -> None:
        """Connects.

        Raises:
            NoSuchSessionError: no engine lives there.
            LinkError: it speaks another version, or does not answer.
            SessionError: the session belongs to another user. The engine lets root in, too.
        """
        session.check_owner(allow_root=True)  # engine.json decides what is connected to
        self._session = session
        engine = session.engine() if session.is_live() else None
        if engine is None:
            raise NoSuchSessionError(
                f"session '{session.name}' has no engine; start one with: "
                f"rlhf-tui resume {session.name}"
            )
        if engine.host != socket.gethostname():
            raise NoSuchSessionError(
                f"the engine of '{session.name}' runs on {engine.host}: steer it from there"
            )
        try:
            self._sock = sockets.connect(Path(engine.socket), REPLY_TIMEOUT)
            self._send(ClientHello(who=who))
            welcome = self._receive()
        except OSError as error:
            raise LinkError(f"the engine of '{session.name}' does not answer: {error}") from error
        if not isinstance(welcome, Welcome) or welcome.version != frames.VERSION:
            raise LinkError(
                f"the engine of '{session.name}' speaks another version; use the rlhf-tui that "
                "started it, or stop and resume it with this one"
            )
        self.pid = welcome.pid

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up; the engine goes on."""
        self._sock.close()

    def send(self, command: Command, command_id: str | None = None) -> CommandReply:
        """Sends a command; the answer that comes at once: accepted, applied or rejected."""
        chosen = command_id or new_id()
        # Whoever sends one holds it as its base class.
        self._send(CommandRequest(id=chosen, command=command))  # type: ignore[arg-type]
        try:
            return self._answer(chosen, time.monotonic() + REPLY_TIMEOUT)
        except TimeoutError as error:
            raise LinkError(f"the engine of '{self._session.name}' does not answer") from error

    def wait(self, command_id: str, timeout: float | None = None) -> CommandReply:
        """Waits until a command has ended. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (answer := self._answer(command_id, deadline)).final:
            continue
        return answer

    def status(self) -> Status:
        """How the engine is, now."""
        self._send(StatusRequest())
        while not isinstance(message := self._receive(), Status):
            continue
        return message

    def watch(self) -> Iterator[JournalAdvanced | Phase | Telemetry]:
        """What happens, as it happens; ends when the engine does."""
        self._send(Watch())
        self._sock.settimeout(None)
        try:
            while True:
                message = self._receive()
                if isinstance(message, JournalAdvanced | Phase | Telemetry):
                    yield message
        except (OSError, LinkError):
            return

    def _answer(self, command_id: str, deadline: float | None) -> CommandReply:
        while True:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            self._sock.settimeout(left)
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
            raise LinkError(f"the engine of '{self._session.name}' hung up") from error


def new_id() -> str:
    """A command's id: unique, and readable in a ledger."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
