"""Length-prefixed MessagePack frames: what every message on the socket travels in."""

import socket
import struct
from typing import TypeVar

import msgspec
from msgspec import Struct

from engine.errors import LinkError

T = TypeVar("T")

VERSION = 1
"""Of this protocol. Both sides say theirs; a difference is an error, not a guess."""

MAX_FRAME = 64 * 1024 * 1024

HEADER = struct.Struct(">I")


class Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Anything that travels."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One frame. Raises LinkError when it would be longer than MAX_FRAME or cannot be encoded."""
    try:
        body = _encoder.encode(message)
    except OverflowError as error:  # MessagePack holds integers of 64 bits
        raise LinkError(f"a number in the message is too large to be sent: {error}") from error
    if len(body) > MAX_FRAME:
        raise LinkError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes, limit: int = MAX_FRAME) -> int:
    """The body's length. Raises LinkError when it is over the limit."""
    (length,) = HEADER.unpack(header)
    if length > limit:
        raise LinkError(f"a frame of {length} bytes is over the limit of {limit}")
    return int(length)


def receive(sock: socket.socket) -> bytes:
    """One frame's body, from a blocking socket.

    Raises:
        ConnectionError: the other side hung up, be it in the middle of a frame.
        TimeoutError: nothing came within the socket's timeout.
        LinkError: the frame is over MAX_FRAME.
    """
    return _exactly(sock, frame_length(_exactly(sock, HEADER.size)))


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the connection ended")
        data += piece
    return bytes(data)


def decode(decoder: msgspec.msgpack.Decoder[T], body: bytes, what: str) -> T:
    """A frame's body as one of the messages that may come here.

    Args:
        decoder: of their types.
        body: of the frame.
        what: they are, for the error: `a client's message`.

    Raises:
        LinkError: it is none of them.
    """
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise LinkError(f"not {what} of protocol {VERSION}: {error}") from error
