"""Length-prefixed MessagePack frames: what every message on the socket travels in."""

import struct

import msgspec
from msgspec import Struct

from engine.errors import LinkError

VERSION = 1
"""Of this protocol. Both sides say theirs; a difference is an error, not a guess."""

MAX_FRAME = 64 * 1024 * 1024

HEADER = struct.Struct(">I")


class Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Anything that travels."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One frame. Raises LinkError when it would be longer than MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise LinkError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The body's length. Raises LinkError when it is over MAX_FRAME."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME:
        raise LinkError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
    return int(length)
