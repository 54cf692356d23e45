"""The order in which responses are judged, and how the judgements agree with the reward model."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median, pstdev

from msgspec import Struct

from engine.journal.judgements.labels import Key
from engine.journal.rows import SampleRow
from rlhf_tui.widgets.samples.judgement import key_of

ORDERS = ("uncertain", "outliers", "random")
QUEUE_SIZE = 100
"""Number of judgements in one queue."""
POOL_SIZE = 2000
"""Number of newest responses without a judgement from which a queue is drawn."""


class Decision(Struct, frozen=True):
    """A response that was judged or skipped."""

    row: SampleRow
    label: str | None
    """None: skipped."""


class JudgingQueue:
    """A queue of responses, each shown at most once, and so is each text.

    A skipped response is replaced by another from the pool. The label `good` agrees with the
    reward model if the score is above the median of the pool, every other label if it is not.
    """

    def __init__(self, pool: Sequence[SampleRow], size: int = QUEUE_SIZE) -> None:
        """Creates a queue from a pool of responses.

        Args:
            pool: responses without a judgement, the newest first.
            size: the maximum number of judgements.
        """
        texts = {(row.prompt, row.response): row for row in reversed(pool)}
        self._pool = list(texts.values())[::-1]
        self._size = size
        self._ranks = {order: _ranks(self._pool, order) for order in ORDERS}
        self._scores = sorted(s for row in pool if (s := _finite(row.score)) is not None)
        self._median = median(self._scores) if self._scores else 0.0
        self.order = ORDERS[0]
        self.decisions: list[Decision] = []
        self._ahead: list[SampleRow] = []
        self._sort()

    @property
    def current(self) -> SampleRow | None:
        """The response to be judged; None at the end."""
        return self._ahead[0] if self._ahead and self.judged < self._size else None

    @property
    def judged(self) -> int:
        """The number of judgements."""
        return sum(d.label is not None for d in self.decisions)

    @property
    def total(self) -> int:
        """The number of judgements at the end of the queue."""
        return min(self._size, self.judged + len(self._ahead))

    def cycle_order(self) -> None:
        """Sorts the rest by the next order."""
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self._sort()

    def decide(self, label: str | None) -> Decision | None:
        """Judges the current response, or skips it (None); None at the end."""
        if (row := self.current) is None:
            return None
        decision = Decision(row, label)
        self.decisions.append(decision)
        self._ahead.pop(0)
        return decision

    def undo(self) -> Decision | None:
        """Takes the last decision back: its response is the current one again."""
        return self.take_back(self.decisions[-1]) if self.decisions else None

    def take_back(self, decision: Decision) -> Decision:
        """Takes a decision back, such as one that could not be written."""
        self.decisions.remove(decision)
        self._ahead.insert(0, decision.row)
        return decision

    def replace(self, row: SampleRow) -> None:
        """Replaces a response that is not judged yet by itself with a note."""
        self._ahead = [row if key_of(each) == key_of(row) else each for each in self._ahead]

    def agrees(self, decision: Decision) -> bool | None:
        """Whether the score agrees; None for a skipped response and without a score."""
        score = _finite(decision.row.score)
        if decision.label is None or score is None:
            return None
        return (decision.label == "good") == (score > self._median)

    def share_below(self, row: SampleRow) -> float | None:
        """The share of the pool with a lower score; None without a score."""
        score = _finite(row.score)
        return None if score is None else sum(s < score for s in self._scores) / len(self._scores)

    def agreement(self) -> tuple[int, int]:
        """The number of judgements that the scores agree with, and of those compared."""
        found = Counter(self.agrees(decision) for decision in self.decisions)
        return found[True], found[True] + found[False]

    def _sort(self) -> None:
        done = {key_of(decision.row) for decision in self.decisions}
        notes = {key_of(row): row for row in self._ahead}
        ranks = self._ranks[self.order]
        rest = [row for row in self._pool if key_of(row) not in done]
        rest.sort(key=lambda row: ranks[key_of(row)])
        self._ahead = [notes.get(key_of(row), row) for row in rest]


def _ranks(pool: Sequence[SampleRow], order: str) -> dict[Key, float]:
    """Key → rank, the lowest first. Responses without a score come last, except at random."""
    if order == "random":
        draw = random.Random(0)  # noqa: S311 - no secret
        return {key_of(row): draw.random() for row in pool}
    scores = [s for row in pool if (s := _finite(row.score)) is not None]
    middle = median(scores) if scores else 0.0
    distances = {
        key_of(row): math.inf if (s := _finite(row.score)) is None else abs(s - middle)
        for row in pool
    }
    if order == "outliers":
        return {key: d if math.isinf(d) else -d for key, d in distances.items()}
    return _disagreement(pool) or distances


def _disagreement(pool: Sequence[SampleRow]) -> dict[Key, float]:
    """Key → minus the largest difference between the sources' standardised scores.

    Empty if fewer than two sources have varying scores: then only the distance from the median
    shows how undecided the reward model is.
    """
    values: dict[str, list[float]] = {}
    for row in pool:
        for name, value in row.parts.items():
            if (finite := _finite(value)) is not None:
                values.setdefault(name, []).append(finite)
    scales = {name: (fmean(v), pstdev(v)) for name, v in values.items() if len(set(v)) > 1}
    if len(scales) < 2:
        return {}
    ranks = {}
    for row in pool:
        units = [
            (finite - scales[name][0]) / scales[name][1]
            for name, value in row.parts.items()
            if name in scales and (finite := _finite(value)) is not None
        ]
        ranks[key_of(row)] = min(units) - max(units) if units else 0.0
    return ranks


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
