"""A reward function with TRL's interface: keyword arguments, and one float per response."""

from typing import Any


def brevity(completions: list[str], **_: Any) -> list[float]:
    """Returns 1 for an empty response, 0 for ten words, and less than 0 for longer responses."""
    return [1.0 - len(text.split()) / 10 for text in completions]
