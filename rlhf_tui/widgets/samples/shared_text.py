"""What all prompts of a list have in common, which the list leaves out.

The prompts of a chat model begin and end with the markup of its chat template, often with a system
message. In a column of twenty cells nothing else would be seen.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass

ENDS_MARKUP = "\n>"
BEGINS_MARKUP = "\n<"


@dataclass(frozen=True)
class SharedText:
    """How many characters all prompts of a list share, as far as they end or begin with markup."""

    start: int = 0
    end: int = 0

    def left_out(self, prompt: str) -> str:
        """One of these prompts without them, stripped; the whole prompt if nothing is left."""
        rest = prompt[self.start : len(prompt) - self.end].strip()
        return rest or prompt.strip()


def shared_text(prompts: Iterable[str]) -> SharedText:
    """Compares prompts: whole lines or up to a `>` at the start, from a `<` or a line at the end.

    A common word is not left out, and nothing if all prompts are the same.
    """
    distinct = set(prompts)
    if len(distinct) < 2:
        return SharedText()
    start = _common_start(distinct)
    end = _common_start({prompt[::-1] for prompt in distinct})
    return SharedText(
        start=max(start.rfind(mark) for mark in ENDS_MARKUP) + 1,
        end=max(end.rfind(mark) for mark in BEGINS_MARKUP) + 1,
    )


def _common_start(texts: Set[str]) -> str:
    first, last = min(texts), max(texts)  # the others are between them and begin alike
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), len(first))]
