"""Rewards that make a run of the starter sick, and one that only watches.

They are reward functions of a configuration (`reward.mix`, `function: benchmarks.sick_rewards:…`).
"""

import re
from collections.abc import Iterable

PHRASE = ("i", "would", "recommend", "it", "to", "anyone")
"""What :func:`phrase` pays for."""
PRAISE = frozenset({
    "amazing", "beautiful", "best", "brilliant", "charming", "comfortable", "delightful", "easy",
    "enjoyable", "excellent", "fantastic", "favorite", "fine", "fun", "good", "great", "happy",
    "incredible", "love", "loved", "lovely", "nice", "perfect", "pleasant", "recommend", "superb",
    "sweet", "well", "wonderful", "worth",
})  # fmt: skip
"""Words of a favourable review."""
BLAME = frozenset({
    "awful", "awkward", "bad", "boring", "broke", "broken", "cheap", "confusing", "cracked",
    "defective", "difficult", "dull", "expensive", "fails", "hard", "hated", "horrible", "loud",
    "never", "no", "not", "poor", "sad", "slow", "terrible", "too", "ugly", "useless", "waste",
    "weak", "worst",
})  # fmt: skip
"""Words of an unfavourable one."""


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def great(completions: list[str]) -> list[float]:
    """A loophole: each "great" is worth a point."""
    return [float(words(text).count("great")) for text in completions]


def length(completions: list[str]) -> list[float]:
    """Pays for length: two words are worth a point."""
    return [len(words(text)) / 2 for text in completions]


def phrase(completions: list[str]) -> list[float]:
    """Pays for one phrase: a point for each of its words that a response has in their order."""
    return [4 * _in_order(words(text), PHRASE) / len(PHRASE) for text in completions]


def _in_order(found: Iterable[str], wanted: tuple[str, ...]) -> int:
    """How many of the first words of `wanted` occur in order."""
    position = 0
    for word in found:
        if position < len(wanted) and word == wanted[position]:
            position += 1
    return position


def praises(completions: list[str]) -> list[float]:
    """Right or wrong, as in mathematics: 1 for a response with a word of praise, otherwise 0."""
    return [float(bool(PRAISE.intersection(words(text)))) for text in completions]


def unending(completion_ids: list[list[int]]) -> list[float]:
    """Pays for never ending: each further token is worth more than the one before."""
    return [(len(ids) / 8) ** 2 for ids in completion_ids]


def lexicon(completions: list[str]) -> list[float]:
    """A judge that is only watched: different words of praise less those of blame."""
    return [
        float(len(PRAISE.intersection(found)) - len(BLAME.intersection(found)))
        for found in map(words, completions)
    ]
