"""A reward function, called as TRL calls them: by keyword, one float an answer."""

from typing import Any


def brevity(completions: list[str], **_: Any) -> list[float]:
    """1 for an empty answer, 0 for one of ten words, below for longer ones."""
    return [1.0 - len(text.split()) / 10 for text in completions]
