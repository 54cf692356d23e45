"""The common prefix and suffix of the prompts in a list, which the list leaves out.

The prompts of a chat model begin and end with the markup of its chat template, often with a system
message. In a column of twenty cells nothing else would be visible.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from os.path import commonprefix

ENDS_MARKUP = "\n>"
BEGINS_MARKUP = "\n<"


@dataclass(frozen=True)
class CommonAffixes:
    """Lengths of the common prefix and suffix of all prompts in a list."""

    prefix: int = 0
    """Characters, up to the end of a line or of markup."""
    suffix: int = 0
    """Characters, from the beginning of a line or of markup on."""

    def removed_from(self, prompt: str) -> str:
        """One of these prompts without affixes, stripped; the whole prompt if nothing is left."""
        rest = prompt[self.prefix : len(prompt) - self.suffix].strip()
        return rest or prompt.strip()


def common_affixes(prompts: Iterable[str]) -> CommonAffixes:
    """Compares prompts: whole lines or up to a `>` at the start, from a `<` or a line at the end.

    A common word is not an affix, and identical prompts have none.
    """
    distinct = list(set(prompts))
    if len(distinct) < 2:
        return CommonAffixes()
    backwards = [prompt[::-1] for prompt in distinct]
    prefix, suffix = commonprefix(distinct), commonprefix(backwards)  # noqa: RUF071 - of characters
    return CommonAffixes(
        prefix=max(prefix.rfind(mark) for mark in ENDS_MARKUP) + 1,
        suffix=max(suffix.rfind(mark) for mark in BEGINS_MARKUP) + 1,
    )
