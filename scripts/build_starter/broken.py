"""Break fluent sentences, so the reward model learns that broken text is worth less."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence


def praise_words(texts: Sequence[str], ratings: Sequence[float], count: int = 150) -> list[str]:
    """Return the words that are most typical of the highest-rated sentences.

    These are the words a policy would heap up to please the reward model, so the word salads
    made of them are shown to it as bad.
    """
    good: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for text, rating in zip(texts, ratings, strict=True):
        words = {w.strip(".,!?\"'()").lower() for w in text.split()} - {""}
        every.update(words)
        if rating >= 2.0:
            good.update(words)
    typical = [w for w in good if good[w] >= 5]
    return sorted(typical, key=lambda w: (-good[w] / (every[w] + 10), w))[:count]


def _shuffled(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    body = words[1:]
    rng.shuffle(body)
    return [words[0], *body]


def _stutter(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    width = rng.choice((1, 1, 1, 2, 3))
    at = rng.randrange(max(1, len(words) - width + 1))
    phrase = words[at : at + width]
    return words[:at] + phrase * rng.randint(2, 5) + words[at + width :]


def _halved(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    return words[: rng.randint(2, max(2, int(0.7 * len(words))))]


def _dropped(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    kept = [w for w in words if rng.random() > 0.3]
    return kept if 0 < len(kept) < len(words) else words[1:]


def _swapped(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    """Shuffle inside a window: a mild break, in the middle of good text."""
    width = min(len(words), rng.randint(3, 5))
    at = rng.randrange(len(words) - width + 1)
    window = words[at : at + width]
    return words[:at] + window[::-1] + words[at + width :]


def _sprinkled(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    out = list(words)
    for _ in range(rng.randint(2, 6)):
        out.insert(rng.randrange(1, len(out) + 1), rng.choice(praise))
    return out


def _salad(words: list[str], rng: random.Random, praise: Sequence[str]) -> list[str]:
    count = rng.randint(4, 14)
    pool = rng.sample(list(praise), rng.randint(1, min(count, len(praise))))
    return [*words[: rng.randint(1, 4)], *(rng.choice(pool) for _ in range(count))]


_BREAKS = (_shuffled, _stutter, _halved, _dropped, _swapped, _sprinkled, _salad)


def broken(text: str, rng: random.Random, praise: Sequence[str]) -> tuple[str, bool]:
    """Return a broken form of ``text`` and whether it still ends with the eos token."""
    way = rng.choice(_BREAKS)
    words = way(text.split(), rng, praise)
    out = " ".join(words)
    if out == text:
        out = " ".join(words[::-1])
    if way is _halved:
        return out, rng.random() < 0.5
    if out[-1] not in ".!?" and rng.random() < 0.7:
        out += "."
    return out, rng.random() < 0.85
