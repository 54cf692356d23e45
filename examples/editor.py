"""An environment for a model that continues text: an editor asks a reviewer for two more points.

A response is the first sentence of a review and one sentence for each point, which the editor
begins: a good point or a bad one. It is scored by the share of points that are as asked for. Each
point has its own score, so the policy learns which of its turns was right.
"""

import random
import re

GOOD = re.compile(
    r"\b(amazing|beautiful|best|comfortable|easy|enjoyable|excellent|fantastic|fast|fine|fun|funny"
    r"|good|great|like|liked|love|loved|nice|perfect|powerful|quality|smart|strong|well|wonderful)\b"
)
BAD = re.compile(
    r"\b(annoying|awful|bad|boring|broken|broke|cheap|confusing|difficult|disappointing|dull|empty"
    r"|flat|hard|hate|lacks|long|loud|missing|never|no|not|poor|slow|terrible|too|weak|worse|worst"
    r"|wrong)\b"
)
BEGINNINGS = {True: " The good thing is that", False: " The bad thing is that"}


class Editor:
    """The environment of one response."""

    def __init__(self, seed: int) -> None:
        """`seed` belongs to the response: a repeated step asks for the same points."""
        numbers = random.Random(seed)  # noqa: S311 - nothing secret
        self._wanted = [numbers.random() < 0.5 for _ in range(2)]
        self._sentences: list[str] = []

    def reply(self, text: str) -> str | None:
        """Gets each turn of the policy; begins the next sentence, or returns None to end."""
        self._sentences.append(text)
        asked = len(self._sentences) - 1
        return BEGINNINGS[self._wanted[asked]] if asked < len(self._wanted) else None

    def as_asked(self) -> list[float]:
        """The scores of the turns: half a point for each that is as asked for."""
        right = map(is_point, self._sentences[1:], self._wanted)
        return [0.0, *(point / len(self._wanted) for point in right)]


def is_point(sentence: str, good: bool) -> bool:
    """Whether a sentence has words of one kind, good or bad, and none of the other."""
    found = [words.search(sentence.lower()) is not None for words in (GOOD, BAD)]
    return found == [good, not good]
