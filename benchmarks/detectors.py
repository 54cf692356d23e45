"""Guard rails that see slow drift: how soon they tell, and how often they are wrong.

    python benchmarks/detectors.py [--runs 40] [--steps 500]
    python benchmarks/detectors.py --journals FOLDER

Without `--journals` the series are simulated. A healthy run learns: its metrics approach another
level, with autocorrelated noise, within the ranges that runs of the starter show. A sick one is a
healthy one in which a metric changes slowly from a random step on, the onset. The table has the
median number of steps from the onset to the first alert, and the share of runs without one: with
the default rules that look at one step or at the last 20, and with those that are sequential. Below
it stand the false alarms per 1,000 healthy steps.

With `--journals` the rules are replayed over recorded sessions, whose names are `healthy-1`,
`loophole-2` and so on. They are sick from their first step: the table has the step of each rule's
first alert.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.journal.reader import JournalReader
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
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import DEFAULT_RULES, Guardrails
from engine.session.folder import Session

WATCHED = "reward/watched"
GROUPS = 16
EVALUATE_EVERY = 10
SETTINGS = {"target": 6.0, "max_new_tokens": 512, "beta": 0.05}

Metrics = dict[str, float | None]


def is_sequential(rule: Rule) -> bool:
    """Whether a rule looks at more than one step against the last ones."""
    return bool(rule.drifts_up or rule.drifts_down or rule.diverges or rule.lasts > 1)


# -- simulated runs --------------------------------------------------------------------------------


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
            EXPLAINED_VARIANCE: explained * risen - 0.3 * (1 - risen) + n_explained.next(),
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
"""Sickness → what it changes, and the metrics whose rules are to tell."""


def sick(draw: random.Random, steps: int, change: Change) -> tuple[list[Metrics], int]:
    """A run that falls ill, and its onset."""
    run = healthy(draw, steps)
    onset, duration = draw.randint(40, steps // 3), draw.randint(30, 120)
    for step in range(onset, steps + 1):
        change(run[step - 1], min((step - onset) / duration, 1.0))
    return run, onset


def alerts(rules: Iterable[Rule], run: list[Metrics]) -> list[tuple[int, str, str]]:
    """Step, rule and metric of each alert."""
    rails = Guardrails(GuardrailConfig(defaults=False, rules=list(rules)), (WATCHED, EVAL_SCORE))
    return [
        (step, alert.rule, alert.evidence.get("metric", ""))
        for step, metrics in enumerate(run, start=1)
        for alert in rails.check(step, metrics, SETTINGS)
    ]


def delays(
    rules: list[Rule], change: Change, metrics: frozenset[str], runs: int, steps: int
) -> list[float]:
    """Steps from the onset to the first alert of each run; infinite without one."""
    found = []
    for seed in range(runs):
        run, onset = sick(random.Random(seed), steps, change)
        told = [
            step for step, _, metric in alerts(rules, run) if step >= onset and metric in metrics
        ]
        found.append(min(told, default=math.inf) - onset)
    return found


def shown(found: list[float]) -> str:
    """The median, and the share without an alert."""
    told = [d for d in found if math.isfinite(d)]
    if not told:
        return "never"
    missed = 1 - len(told) / len(found)
    return f"{statistics.median(told):.0f}" + (f" ({missed:.0%} never)" if missed else "")


def simulate(runs: int, steps: int) -> None:
    """Prints the tables of simulated runs."""
    now = [rule for rule in DEFAULT_RULES if not is_sequential(rule)]
    sequential = [rule for rule in DEFAULT_RULES if is_sequential(rule)]
    print(f"{'sickness':<22}{'thresholds, last 20 steps':>28}{'sequential rules':>28}")
    for name, (change, metrics) in SICKNESSES.items():
        cells = [shown(delays(rules, change, metrics, runs, steps)) for rules in (now, sequential)]
        print(f"{name:<22}{cells[0]:>28}{cells[1]:>28}")
    for title, rules in (("thresholds", now), ("sequential", sequential)):
        false: dict[str, int] = {}
        for seed in range(1000, 1000 + 5 * runs):
            run = healthy(random.Random(seed), steps)
            for _, rule, _ in alerts(rules, run):
                false[rule] = false.get(rule, 0) + 1
        total = 5 * runs * steps
        rate = 1000 * sum(false.values()) / total
        print(f"{title}: {rate:.3f} false alarms per 1,000 healthy steps ({total:,} steps) {false}")


# -- recorded runs ---------------------------------------------------------------------------------


def replay(folder: Path) -> None:
    """Prints the first alert of each rule over recorded sessions."""
    healthy_steps = 0
    false: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        session = Session(path)
        first: dict[str, int] = {}
        config = session.config()
        rails = Guardrails(GuardrailConfig(), judges_of(config))
        settings = SETTINGS | {
            "target": config.kl.target, "max_new_tokens": config.rollout.max_new_tokens,
        }  # fmt: skip
        steps: dict[int, Metrics] = {}
        with JournalReader(session) as journal:
            for name in journal.metric_names():
                for step, value in journal.series(name):
                    steps.setdefault(step, {})[name] = math.nan if value is None else value
        for step, metrics in sorted(steps.items()):
            for alert in rails.check(step, metrics, settings):
                first.setdefault(alert.rule, step)
                if path.name.startswith("healthy"):
                    false[alert.rule] = false.get(alert.rule, 0) + 1
        healthy_steps += len(steps) if path.name.startswith("healthy") else 0
        sequential = {r.name for r in DEFAULT_RULES if is_sequential(r)}
        told = [f"{name} {step}" for name, step in first.items() if name in sequential]
        others = [f"{name} {step}" for name, step in first.items() if name not in sequential]
        print(f"{path.name:<14}{len(steps):>4} steps   {', '.join(told) or '–'}")
        print(f"{'':<26}thresholds: {', '.join(others) or '–'}")
    print(f"{sum(false.values())} alerts in {healthy_steps:,} healthy steps {false}")


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=40, help="simulated runs of each sickness")
    parser.add_argument("--steps", type=int, default=500, help="steps of a simulated run")
    parser.add_argument("--journals", type=Path, help="a folder of recorded sessions")
    given = parser.parse_args()
    if given.journals is not None:
        replay(given.journals)
    else:
        simulate(given.runs, given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
