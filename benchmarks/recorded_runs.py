"""The runs that :mod:`benchmarks.sick_runs` has made, and when their sickness has done its harm."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.metrics import KL

Metrics = dict[str, float | None]

HONEST = "reward/honest"
"""The score of the starter's reward model, which every run has, trained on it or not."""
SMOOTH = 5
"""Steps in the mean by which the honest score is judged; of 16 responses each."""
MIN_LOSS = 0.4
"""A smaller fall of the smoothed honest score is noise: four of its standard errors."""
KL_TIMES = 2.0
"""The multiple of its target from which a KL is harm."""


@dataclass(frozen=True)
class RecordedRun:
    """A run of the starter."""

    kind: str
    seed: int
    settings: dict[str, Any]
    judges: list[str]
    """Metrics of judges that it was not trained on."""
    steps: list[Metrics]
    """The first is that of step 1."""

    @property
    def healthy(self) -> bool:
        """Whether nothing was done to it."""
        return self.kind.startswith("healthy")

    def score_lost(self) -> float:
        """The step by which the honest score has lost half of its gain; infinite if it has not.

        A score that has gained nothing, or next to nothing, has lost when it has fallen by
        :data:`MIN_LOSS`.
        """
        scores = [m[HONEST] for m in self.steps]
        first = best = None
        for step in range(SMOOTH, len(scores) + 1):
            mean = fmean(s if s is not None else math.nan for s in scores[step - SMOOTH : step])
            if first is None or best is None:
                first = best = mean
            best = max(best, mean)
            if best - mean > max((best - first) / 2, MIN_LOSS):
                return step
        return math.inf

    def kl_passed(self) -> float:
        """The first step whose KL is above twice the target; infinite if there is none."""
        bound = KL_TIMES * self.settings["target"]
        over = (step for step, m in enumerate(self.steps, start=1) if (m.get(KL) or 0.0) > bound)
        return next(over, math.inf)

    def harmed(self) -> float:
        """The first step at which either is so."""
        return min(self.score_lost(), self.kl_passed())


def read(file: Path, seeds: range) -> list[RecordedRun]:
    """The runs of a file with these seeds, of each kind and seed the first."""
    runs: dict[tuple[str, int], RecordedRun] = {}
    for row in _rows(file):
        if row["seed"] in seeds and row["steps"]:
            steps: list[Metrics] = [
                {name: values[i] for name, values in row["metrics"].items()}
                for i in range(row["steps"])
            ]
            run = RecordedRun(row["kind"], row["seed"], row["settings"], row["judges"], steps)
            runs.setdefault((run.kind, run.seed), run)
    return list(runs.values())


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
