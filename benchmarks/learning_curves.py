"""The curves of `benchmarks.learning_vs_trl`, and the tables that compare them."""

import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

BETA = 0.05
LEVELS = (1.8, 2.0)
"""Scores whose time is measured."""
SMOOTHED = 3
"""Steps of the mean that must reach a level."""


@dataclass(frozen=True)
class Curve:
    """One run of a side; a value per step in each list."""

    side: str
    seed: int
    scores: list[float]
    kl: list[float]
    cpu: list[float]
    """Processor seconds since the start of training, evaluations excluded."""
    updates: int
    """Optimiser steps of the whole run."""
    held_out: list[tuple[int, float, float]] = field(default_factory=list)
    """Steps done, mean score and mean KL of responses to the prompts that are not trained on."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """The metrics `RECORDED` of `learning_vs_trl`."""

    def cut(self, steps: int) -> "Curve":
        """The first steps alone."""
        updates = self.updates * steps // len(self.scores)
        return replace(
            self,
            scores=self.scores[:steps],
            kl=self.kl[:steps],
            cpu=self.cpu[:steps],
            updates=updates,
            held_out=[e for e in self.held_out if e[0] <= steps],
            others={name: values[:steps] for name, values in self.others.items()},
        )

    def objective(self, part: slice = slice(None)) -> float:
        """The mean of score − β·KL over a part of the steps."""
        pairs = zip(self.scores[part], self.kl[part], strict=True)
        return statistics.mean(score - BETA * kl for score, kl in pairs)

    def reached(self, level: float) -> int | None:
        """The first step (from 0) at which the smoothed score is at least `level`."""
        for end in range(SMOOTHED, len(self.scores) + 1):
            if statistics.mean(self.scores[end - SMOOTHED : end]) >= level:
                return end - 1
        return None


def read(out: Path, steps: int) -> list[Curve]:
    """The curves in a file that have at least `steps` steps, cut to these."""
    lines = out.read_text().splitlines() if out.exists() else []
    curves = [Curve(**json.loads(line)) for line in lines]
    return [c.cut(steps) for c in curves if len(c.scores) >= steps]


def print_table(curves: list[Curve], sides: list[str], steps: int) -> None:
    """Prints a row for each side: means over seeds ± standard errors."""
    last = slice(-(steps // 4), None)
    print(
        f"{'':<15}{'seeds':>6}{'updates':>9}{'objective':>16}{'last quarter':>16}{'less TRL':>16}"
        f"{'score':>16}{'KL':>14}{'CPU s a step':>15}"
        + "".join(f"{f'CPU s to {level}':>20}" for level in LEVELS)
    )
    by_side = {side: [c for c in curves if c.side == side] for side in sides}
    trl = [c.objective(last) for c in curves if c.side == "trl"]
    for side, runs in by_side.items():
        if not runs:
            continue
        columns = [
            f"{len(runs):>6}",
            f"{'/'.join(map(str, sorted({c.updates for c in runs}))):>9}",
            f"{spread([c.objective() for c in runs]):>16}",
            f"{spread([c.objective(last) for c in runs]):>16}",
            f"{difference([c.objective(last) for c in runs], trl):>16}",
            f"{spread([statistics.mean(c.scores[last]) for c in runs]):>16}",
            f"{spread([statistics.mean(c.kl[last]) for c in runs]):>14}",
            f"{spread([c.cpu[-1] / steps for c in runs], 2):>15}",
            *(f"{time_to(runs, level):>20}" for level in LEVELS),
        ]
        print(f"{side:<15}" + "".join(columns))
    print_held_out(by_side, sorted({e[0] for c in curves for e in c.held_out}))


def print_held_out(by_side: dict[str, list[Curve]], steps: list[int]) -> None:
    """Prints score − β·KL on the held-out prompts after some of the steps."""
    print("\nheld-out prompts: score − β·KL and its difference from TRL's, score, KL\n")
    for step in steps:
        found = {
            side: [(score, kl) for c in runs for at, score, kl in c.held_out if at == step]
            for side, runs in by_side.items()
        }
        trl = [score - BETA * kl for score, kl in found.get("trl", [])]
        for side, pairs in found.items():
            if not pairs:
                continue
            values = [score - BETA * kl for score, kl in pairs]
            columns = [
                f"{spread(values):>16}",
                f"{difference(values, trl):>17}",
                f"{spread([score for score, _ in pairs]):>16}",
                f"{spread([kl for _, kl in pairs]):>16}",
            ]
            print(f"step {step:>3} {side:<15}{len(pairs):>3}" + "".join(columns))


def time_to(runs: list[Curve], level: float) -> str:
    """Processor seconds until the smoothed score reaches a level, in the runs that reach it."""
    ends = [(c, c.reached(level)) for c in runs]
    times = [c.cpu[end] for c, end in ends if end is not None]
    if not times:
        return f"none of {len(runs)}"
    missing = "" if len(times) == len(runs) else f" ({len(times)}/{len(runs)})"
    return spread(times, 0) + missing


def difference(ours: list[float], theirs: list[float]) -> str:
    """The difference of the means ± its standard error; empty if there are not enough runs."""
    if min(len(ours), len(theirs)) <= 1:
        return ""
    errors = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.3f} ± {math.sqrt(sum(errors)):.3f}"


def spread(values: list[float], digits: int = 3) -> str:
    """The mean ± its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"
