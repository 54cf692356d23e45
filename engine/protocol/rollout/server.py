"""The engine's end of rank 0's connection; used by the engine and by the relay."""

import logging
import os
import socket

from engine.errors import LinkError
from engine.protocol import frames, sockets
from engine.protocol.frames import Message
from engine.protocol.rollout.messages import Start, ToEngine, decode_to_engine

log = logging.getLogger("rollout")

FAILED = 3
"""Exit status after an error that was reported to rank 0."""


def first_client(listener: socket.socket) -> tuple[socket.socket, Start]:
    """Waits for a process of the same user that sends :class:`Start`.

    Skips connections that are already closed: those of a rank that died before this process began.
    """
    while True:
        connection, _ = listener.accept()
        if sockets.peer_uid(connection) != os.getuid():
            log.warning("refused a connection of another user")
            connection.close()
            continue
        try:
            message = receive(connection)
        except (OSError, LinkError) as error:
            log.info("a client disconnected before it began (%s)", error)
            connection.close()
            continue
        if isinstance(message, Start):
            return connection, message
        log.warning("a client began with %s", type(message).__name__)
        connection.close()


def send(connection: socket.socket, message: Message) -> None:
    """Sends a message."""
    connection.sendall(frames.encode(message))


def report(connection: socket.socket, message: Message) -> None:
    """Sends a last message, if the client is still there."""
    try:
        send(connection, message)
    except OSError:
        log.info("rank 0 has disconnected")


def receive(connection: socket.socket) -> ToEngine:
    """Receives a message. Raises ConnectionError at the end of the connection."""
    return decode_to_engine(frames.receive(connection))
