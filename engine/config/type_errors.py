"""Plain words for the errors of msgspec, which name types as Python does."""

import json
import re
from typing import Any

from engine.errors import shortened

_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "null",
    "object": "a section of keys",
    "array": "a list",
}
_BOUNDS = {
    ">=": "of at least",
    "<=": "of at most",
    ">": "above",
    "<": "below",
}
SHOWN_LENGTH = 60
"""Characters of a wrong value that an error repeats."""


def expected(message: str) -> str:
    """The requirement in a ``msgspec.ValidationError``: "a whole number of at least 1".

    Args:
        message: without the path that msgspec adds. What it says it got is left out, because
            callers show the value itself.

    Returns:
        Words to follow "must be"; empty for a value that is not among a key's choices.
    """
    if message in ("Number out of range", "Integer value out of range"):
        return "a finite number"
    words = re.sub(r"^Invalid enum value (.+)$", "", message).partition(", got ")[0]
    words = words.replace("Expected ", "").replace("`", "").replace(" | ", ", or ")
    for sign, meaning in _BOUNDS.items():
        words = words.replace(f" {sign} ", f" {meaning} ")
    words = words.replace(" of length of ", " of a length of ")
    words = re.sub(r"\b(\d+)\.0\b", r"\1", words)
    return re.sub(r"\b[a-z]+\b", lambda match: _NAMES.get(match[0], match[0]), words)


def shown(value: Any) -> str:
    """A wrong value as an error repeats it, as in YAML and cut to one readable line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return shortened(text, SHOWN_LENGTH)
