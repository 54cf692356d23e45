"""Several data sets with weights: determines from which one each prompt of a run comes."""

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.model import MIXTURE_CYCLE
from engine.train.data.randomness import permutation


class Mixture:
    """Assigns a data set, and a position within it, to each position in the order of prompts.

    Positions are counted in cycles of :data:`MIXTURE_CYCLE`. In each cycle, every data set has
    exactly its share, in an order that depends on seed and cycle only. So a position is found
    without the earlier ones, and a resumed run draws the same prompts as an uninterrupted one.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        self._seed = seed
        self._shares = shares(weights, MIXTURE_CYCLE)
        self._cycle = -1
        self._labels: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._before: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[int, int]:
        """Returns the data set of a position, and the position within it; both count from 0."""
        cycle, offset = divmod(position, MIXTURE_CYCLE)
        if cycle != self._cycle:
            self._cycle = cycle
            self._labels = self._order("mixture", cycle)
            self._before = np.empty_like(self._labels)
            for label, share in enumerate(self._shares):
                self._before[self._labels == label] = np.arange(share)
        label = int(self._labels[offset])
        return label, cycle * self._shares[label] + int(self._before[offset])

    def redrawn(self, step: int, attempt: int, count: int) -> list[int]:
        """Returns the data sets of `count` prompts that replace some of a step."""
        labels = self._order("mixture redraw", step, attempt)
        return [int(labels[i % MIXTURE_CYCLE]) for i in range(count)]

    def _order(self, purpose: str, *numbers: int) -> NDArray[np.int64]:
        labels = np.repeat(np.arange(len(self._shares)), self._shares)
        order = permutation(self._seed, purpose, numbers, MIXTURE_CYCLE).numpy()
        return np.asarray(labels[order], dtype=np.int64)


def shares(weights: list[float], total: int) -> list[int]:
    """Divides `total` in proportion to weights; rounds those with the largest remainders up.

    No share is 0 if no weight is below a `total`th of their sum.
    """
    exact = np.array(weights) / sum(weights) * total
    found = np.maximum(np.floor(exact + 1e-9), 1.0)
    rest = total - int(found.sum())
    # Raising shares to 1 may exceed the total: the largest share is reduced instead.
    if rest < 0:
        found[int(np.argmax(found))] += rest
        rest = 0
    largest = np.argsort(found - exact, kind="stable")[:rest]
    found[largest] += 1
    return [int(n) for n in found]
