"""Messages of the key-value store by which the machines of a run find each other.

The operations are those of torch's stores, as its process groups need them. A value is a byte
string. Messages are those of :mod:`engine.protocol.frames`, in authenticated frames.
"""

from collections.abc import Callable

from engine.protocol.frames import Message, decoder


class SetKeys(Message, frozen=True, tag="set"):
    """Sets keys."""

    values: dict[str, bytes]


class GetKeys(Message, frozen=True, tag="get"):
    """Waits until all keys exist, and returns their values if asked to."""

    keys: list[str]
    seconds: float
    """The longest wait."""
    values: bool = True


class CheckKeys(Message, frozen=True, tag="check"):
    """Whether all keys exist."""

    keys: list[str]


class AddToKey(Message, frozen=True, tag="add"):
    """Adds to an integer, which is 0 if the key does not exist; returns the sum."""

    key: str
    amount: int


class AppendToKey(Message, frozen=True, tag="append"):
    """Appends to a value, which is empty if the key does not exist."""

    key: str
    value: bytes


class CompareAndSetKey(Message, frozen=True, tag="compare_set"):
    """Sets a key if it has the expected value, or if it does not exist and "" is expected.

    Returns the value after that; the expected value if the key still does not exist.
    """

    key: str
    expected: bytes
    desired: bytes


class DeleteKey(Message, frozen=True, tag="delete"):
    """Deletes a key; returns whether it existed."""

    key: str


class CountKeys(Message, frozen=True, tag="count"):
    """The number of keys."""


StoreRequest = (
    SetKeys
    | GetKeys
    | CheckKeys
    | AddToKey
    | AppendToKey
    | CompareAndSetKey
    | DeleteKey
    | CountKeys
)


class StoreReply(Message, frozen=True, tag="reply"):
    """The result of a request, in the field for its type."""

    values: list[bytes] = []
    number: int = 0
    """The result of an addition or a count; 1 and 0 for yes and no."""
    missing: str | None = None
    """A key that did not appear in time."""
    error: str = ""
    """Why the request could not be carried out."""


decode_request: Callable[[bytes], StoreRequest] = decoder(StoreRequest, "a request to the store")
"""Decodes a request. Raises LinkError if the body is not one."""
decode_reply: Callable[[bytes], StoreReply] = decoder(StoreReply, "a reply of the store")
"""Decodes a reply. Raises LinkError if the body is not one."""
