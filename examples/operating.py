"""Reward functions with loopholes, for the runs of docs/operating.md."""

from typing import Any

PRAISE = frozenset(
    ["amazing", "beautiful", "best", "excellent", "good", "great", "love", "perfect"]
)


def praise(completions: list[str], **_: Any) -> list[float]:
    """Counts words of praise: a favourable review has some, and so has a heap of them."""
    found = [[word.strip(".,!").lower() for word in text.split()] for text in completions]
    return [float(sum(word in PRAISE for word in words)) for words in found]


def words(completions: list[str], **_: Any) -> list[float]:
    """Counts words: a longer review says more, or the same again."""
    return [float(len(text.split())) for text in completions]
