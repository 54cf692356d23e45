"""Messages from the machine of a session to a copy: JSON, one message per line."""

from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import LinkError
from engine.examined import examined

VERSION = 1
"""Version of these messages. Both sides must have the same."""


class Hello(Struct, frozen=True, tag="hello"):
    """The first message."""

    version: int
    name: str
    config: str
    """The text of config.yaml."""


class Rows(Struct, frozen=True, tag="rows"):
    """Rows of a table, to be added or to replace those with the same keys."""

    file: str
    """journal, samples or labels."""
    table: str
    columns: list[str]
    rows: list[list[Any]]
    clear: bool = False
    """Whether all existing rows of the copy are removed first."""


class EngineState(Struct, frozen=True, tag="engine"):
    """Whether an engine runs the session."""

    socket: str | None
    """Path of its socket; None without an engine."""
    pid: int = 0


class Log(Struct, frozen=True, tag="log"):
    """New text of the engine's log."""

    text: str


class Done(Struct, frozen=True, tag="done"):
    """Ends a set of messages that belong together."""


Message = Hello | Rows | EngineState | Log | Done
_decoder = msgspec.json.Decoder(examined(Message))
_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """A message as a line."""
    return _encoder.encode(message) + b"\n"


def decode(line: bytes) -> Message:
    """Decodes a line. Raises LinkError if it is not a message."""
    try:
        message: Message = _decoder.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        text = line[:80].decode("utf-8", "replace").strip()
        raise LinkError(
            f"the other machine did not send a session: {text!r}; its rlhf-tui must be of the same "
            "version, and its shell must print nothing"
        ) from error
    return message
