"""Frames on the socket: a 4-byte big-endian length, followed by a message in MessagePack."""

import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import LinkError
from engine.examined import examined

VERSION = 1
"""Version of the protocol. Both sides send theirs; they must be equal."""

MAX_FRAME = 64 * 1024 * 1024
"""Maximum length of a message in bytes."""

HEADER = struct.Struct(">I")


class Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base class of all messages."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Encodes a message as a frame.

    Raises:
        LinkError: the message is longer than :data:`MAX_FRAME`, or has an integer over 64 bits.
    """
    try:
        body = _encoder.encode(message)
    except OverflowError as error:  # MessagePack holds integers of 64 bits
        raise LinkError(f"a number in the message is too large to be sent: {error}") from error
    return pack(body)


def pack(body: bytes) -> bytes:
    """Frames an encoded message. Raises LinkError if it is too long."""
    if len(body) > MAX_FRAME:
        raise LinkError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes, limit: int = MAX_FRAME) -> int:
    """The length of a frame's body. Raises LinkError if it is over the limit."""
    (length,) = HEADER.unpack(header)
    if length > limit:
        raise LinkError(f"a frame of {length} bytes is over the limit of {limit}")
    return int(length)


def receive(sock: socket.socket) -> bytes:
    """Receives the body of one frame from a blocking socket.

    Raises:
        ConnectionError: the peer closed the connection.
        TimeoutError: the socket's timeout expired.
        LinkError: the frame is over :data:`MAX_FRAME`.
    """
    return _receive_exactly(sock, frame_length(_receive_exactly(sock, HEADER.size)))


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise ConnectionResetError("the peer closed the connection")
        data += chunk
    return bytes(data)


def decoder(kind: Any, what: str) -> Callable[[bytes], Any]:
    """Returns a function that decodes the body of a frame, and raises LinkError for any other.

    Args:
        kind: the expected message, or the union of those expected.
        what: describes them in an error, such as `a client's message`.
    """
    known: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(examined(kind))

    def decode(body: bytes) -> Any:
        try:
            return known.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LinkError(f"not {what} of protocol {VERSION}: {error}") from error

    return decode
