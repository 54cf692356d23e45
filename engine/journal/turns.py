"""The turns of a response: the policy's words, and the replies of its environment between them."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """A part of a response."""

    text: str
    is_reply: bool
    """Whether the environment wrote it."""


def turns_of(response: str, replies: Sequence[tuple[int, int]] | None) -> list[Turn]:
    """Splits a response; the policy's turns and the replies alternate, the first is the policy's.

    Args:
        response: the whole text.
        replies: start and end of each reply, in characters, as a sample has them. Positions outside
            of the text, or before the end of the last reply, are moved to the nearest one inside:
            the text may have been cut.
    """
    turns: list[Turn] = []
    at = 0
    for start, end in replies or ():
        start = min(max(start, at), len(response))
        end = min(max(end, start), len(response))
        turns += [Turn(response[at:start], False), Turn(response[start:end], True)]
        at = end
    return [*turns, Turn(response[at:], False)]
