"""Simulated runs for the measurement of detectors: healthy ones, and ones that fall ill.

A healthy run learns: its metrics approach another level, with autocorrelated noise, within the
ranges that runs of the starter show. A sick one is a healthy one in which a metric changes slowly
from a random step on, the onset.
"""

import math
import random
from collections.abc import Callable

from engine.metrics import (
    CLIP_FRACTION,
    DISTINCT_2,
    ENTROPY,
    EVAL_SCORE,
    EXPLAINED_VARIANCE,
    KL,
    RESPONSE_LENGTH,
    SCORE,
    SCORE_STD,
    ZERO_STD,
)

WATCHED = "reward/watched"
GROUPS = 16
EVALUATE_EVERY = 10
SETTINGS = {"target": 6.0, "max_new_tokens": 512, "beta": 0.05}

Metrics = dict[str, float | None]


class Noise:
    """Autocorrelated noise of a standard deviation."""

    def __init__(self, draw: random.Random, deviation: float, memory: float = 0.4) -> None:
        self._draw, self._deviation, self._memory, self._last = draw, deviation, memory, 0.0

    def next(self) -> float:
        """The noise of the next step."""
        fresh = self._draw.gauss(0, self._deviation * math.sqrt(1 - self._memory**2))
        self._last = self._memory * self._last + fresh
        return self._last


def healthy(draw: random.Random, steps: int) -> list[Metrics]:
    """A run that learns."""
    pace = draw.uniform(15, 120)
    entropy, length, distinct = draw.uniform(1, 4), draw.uniform(10, 300), draw.uniform(0.7, 0.95)
    ends = {
        ENTROPY: draw.uniform(0.5, 1.05), RESPONSE_LENGTH: draw.uniform(0.7, 1.35),
        DISTINCT_2: draw.uniform(0.55, 1.05),
    }  # fmt: skip
    starts = {ENTROPY: entropy, RESPONSE_LENGTH: length, DISTINCT_2: distinct}
    noises = {
        ENTROPY: Noise(draw, entropy * draw.uniform(0.02, 0.08)),
        RESPONSE_LENGTH: Noise(draw, length * draw.uniform(0.03, 0.1)),
        DISTINCT_2: Noise(draw, distinct * draw.uniform(0.02, 0.08)),
    }
    score, explained = draw.uniform(0.5, 3), draw.uniform(0.2, 0.8)
    watched, same = draw.uniform(-0.1, 1.5), draw.uniform(0, 0.6)
    n_score, n_watched, n_held = Noise(draw, 0.2), Noise(draw, 0.2), Noise(draw, 0.08)
    n_clip, n_explained = Noise(draw, 0.015), Noise(draw, draw.uniform(0.05, 0.2))
    run: list[Metrics] = []
    for step in range(1, steps + 1):
        risen = 1 - math.exp(-step / pace)
        metrics: Metrics = {
            name: start * (1 + (ends[name] - 1) * risen) + noises[name].next()
            for name, start in starts.items()
        }
        metrics |= {
            SCORE: score * risen + n_score.next(),
            SCORE_STD: 0.8,
            KL: 5 * risen,
            WATCHED: watched * risen + n_watched.next(),
            EXPLAINED_VARIANCE: explained * (1 - math.exp(-step / 20)) + n_explained.next(),
            CLIP_FRACTION: max(0.05 + 0.12 * math.exp(-step / 4) + n_clip.next(), 0.0),
            ZERO_STD: sum(draw.random() < same for _ in range(GROUPS)) / GROUPS,
        }
        held_out = 0.9 * score * risen + n_held.next()
        metrics[EVAL_SCORE] = held_out if step % EVALUATE_EVERY == 0 else None
        run.append(metrics)
    return run


Change = Callable[[Metrics, float], None]
"""Changes a step's metrics; given is how far the sickness has gone, from 0 to 1."""


def towards(name: str, factor: float) -> Change:
    """Multiplies a metric."""

    def change(metrics: Metrics, share: float) -> None:
        metrics[name] = (metrics[name] or 0.0) * (1 + (factor - 1) * share)

    return change


def to_level(name: str, level: float) -> Change:
    """Leads a metric to a level."""

    def change(metrics: Metrics, share: float) -> None:
        metrics[name] = (metrics[name] or 0.0) * (1 - share) + level * share

    return change


def exploits(judge: str) -> Change:
    """Raises the trained score and lowers another judge's."""

    def change(metrics: Metrics, share: float) -> None:
        metrics[SCORE] = (metrics[SCORE] or 0.0) + 1.5 * share
        if metrics[judge] is not None:
            metrics[judge] = (metrics[judge] or 0.0) - 1.5 * share

    return change


SICKNESSES: dict[str, tuple[Change, frozenset[str]]] = {
    "entropy collapse": (towards(ENTROPY, 0.1), frozenset({ENTROPY})),
    "repetition": (towards(DISTINCT_2, 0.12), frozenset({DISTINCT_2})),
    "longer and longer": (towards(RESPONSE_LENGTH, 3.0), frozenset({RESPONSE_LENGTH})),
    "shorter and shorter": (towards(RESPONSE_LENGTH, 0.15), frozenset({RESPONSE_LENGTH})),
    "updates too large": (to_level(CLIP_FRACTION, 0.35), frozenset({CLIP_FRACTION})),
    "value head fails": (to_level(EXPLAINED_VARIANCE, -3.0), frozenset({EXPLAINED_VARIANCE})),
    "dead groups": (to_level(ZERO_STD, 1.0), frozenset({ZERO_STD})),
    "watched source falls": (exploits(WATCHED), frozenset({SCORE})),
    "held-out score falls": (exploits(EVAL_SCORE), frozenset({SCORE})),
}
"""Sickness → what it changes, and the metrics whose rules are to raise an alert."""


def sick(draw: random.Random, steps: int, change: Change) -> tuple[list[Metrics], int]:
    """A run that falls ill, and its onset."""
    run = healthy(draw, steps)
    onset, duration = draw.randint(40, steps // 3), draw.randint(30, 120)
    for step in range(onset, steps + 1):
        change(run[step - 1], min((step - onset) / duration, 1.0))
    return run, onset
