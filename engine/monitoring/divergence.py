"""A test for the divergence of judges: the trained score rises while another judge's score falls.

The other judges are those that the policy is not trained on: held-out evaluations, the sources of
`eval.rewards`, and sources of weight 0. Both scores are averaged over blocks of steps. They diverge
if, since the block in which the other judge's score was highest, it has fallen and the trained one
has risen, each by so many times its usual change from block to block, in two successive blocks.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median

from engine.config.schema import RunConfig
from engine.metrics import EVAL_SCORE, EVAL_SOURCE, REWARD_SOURCE

BLOCK_SIZE = 5
"""Values of a judge per block. An evaluation is a mean over many responses, so it is one block."""
MIN_BLOCKS = 5
"""Number of blocks from which on the usual change is known."""
CHANGES_REMEMBERED = 40
"""Number of last changes whose median is the usual change."""
BLOCKS_IN_SUCCESSION = 2


def judges_of(config: RunConfig) -> frozenset[str]:
    """The metrics of the judges that a run is not trained on. Sources without a name have none."""
    sources = [EVAL_SOURCE.replace("NAME", s.name) for s in config.eval.rewards if s.name]
    watched = [
        REWARD_SOURCE.replace("NAME", source.name)
        for source in config.reward.sources()
        if source.weight == 0 and source.name
    ]
    return frozenset([EVAL_SCORE, *sources, *watched])


@dataclass(frozen=True)
class Divergence:
    """A judge whose score falls while the trained one rises."""

    judge: str
    """Its metric."""
    since: int
    """The last step of the block in which its score was highest."""
    highest: float
    last: float
    excess: float
    """The smaller of the fall and the rise, in usual changes."""


@dataclass
class _Series:
    """The block means of one judge, and of the trained score over the same steps."""

    length: int
    steps: int = 0
    """Steps of the current block. They may be many: a judge may never score a step."""
    trained: float = 0.0
    """The sum of their trained scores."""
    judged: list[float] = field(default_factory=list)
    last: tuple[float, float] | None = None
    """Trained score and judge's score of the last block."""
    highest: tuple[int, float, float] | None = None
    """Step, trained score and judge's score of the block in which the latter was highest."""
    changes: tuple[deque[float], deque[float]] = field(
        default_factory=lambda: (deque(maxlen=CHANGES_REMEMBERED), deque(maxlen=CHANGES_REMEMBERED))
    )
    blocks: int = 0
    apart: int = 0
    """Number of successive blocks in which the scores have diverged."""
    divergence: Divergence | None = None


class DivergenceTest:
    """The test of a trained score against all judges."""

    def __init__(self, limit: float, judges: Collection[str]) -> None:
        """`limit`: usual changes by which both scores must have moved; `judges`: metrics."""
        self._limit = limit
        self._series = {
            name: _Series(1 if name.startswith("eval/") else BLOCK_SIZE) for name in sorted(judges)
        }

    def add(self, step: int, trained: float, metrics: Mapping[str, float | None]) -> None:
        """Takes a step: the trained score, finite, and all metrics."""
        for name, series in self._series.items():
            series.steps += 1
            series.trained += trained
            if (value := metrics.get(name)) is not None:
                series.judged.append(value)
            if len(series.judged) == series.length:
                self._block(name, series, step)

    @property
    def found(self) -> Divergence | None:
        """The judge that diverges most; None if none does."""
        found = [s.divergence for s in self._series.values() if s.divergence is not None]
        return max(found, key=lambda d: d.excess, default=None)

    def _block(self, name: str, series: _Series, step: int) -> None:
        means = series.trained / series.steps, fmean(series.judged)
        series.steps, series.trained, series.judged = 0, 0.0, []
        series.blocks += 1
        if series.last is not None:
            for changes, old, new in zip(series.changes, series.last, means, strict=True):
                changes.append(abs(new - old))
        series.last = means
        if series.highest is None or means[1] >= series.highest[2]:
            series.highest = step, *means
        since, trained, highest = series.highest
        usual = [median(changes) if changes else 0.0 for changes in series.changes]
        apart = 0.0
        if series.blocks >= MIN_BLOCKS and all(usual):
            apart = min((means[0] - trained) / usual[0], (highest - means[1]) / usual[1])
        series.apart = series.apart + 1 if apart > self._limit else 0
        series.divergence = (
            Divergence(name, since, highest, means[1], apart)
            if series.apart >= BLOCKS_IN_SUCCESSION
            else None
        )
