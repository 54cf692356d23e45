"""The findings of a check."""

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

MAX_LISTED = 5
"""Maximum number of steps or ids that a sentence lists."""


class Finding(Struct, frozen=True):
    """One deviation from what the engine leaves on disk."""

    check: str
    """`files`, `checkpoints`, `steps`, `commands`, `settings`, `samples`, `labels`, `leftovers` or
    `access`."""
    level: Literal["problem", "note"]
    """A note is what a crash leaves behind by design: a resume clears it up."""
    text: str
    advice: str


def problem(check: str, text: str, advice: str) -> Finding:
    """Something that was lost or damaged, or that lets others in."""
    return Finding(check, "problem", text, advice)


def note(check: str, text: str, advice: str) -> Finding:
    """Something that a resume clears up."""
    return Finding(check, "note", text, advice)


def listed(values: Iterable[object]) -> str:
    """The values, separated by commas; the first ones and the number of the others if many."""
    texts = [str(value) for value in values]
    more = len(texts) - MAX_LISTED
    return ", ".join(texts[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
