"""Guard rails: how soon they raise an alert, and how often a false one.

    python -m benchmarks.detectors --runs FILE [--seeds 10 20]
    python -m benchmarks.detectors [--simulated 40] [--steps 500]

With `--runs`, the rules are evaluated on the healthy and sick runs that
:mod:`benchmarks.sick_runs` has made of the starter. Sick runs are sick from step 1 on. For each
sickness, the table has medians of three steps:

- the harm: the honest score has lost half of its gain, or the KL has exceeded twice its target;
- the first alert of the default rules that compare one step, or the mean of the last 20;
- the first alert of the sequential rules.

Brackets give the share of runs without it. "In time" is the share of runs in which a rule has
raised an alert before the harm. The rules that have raised an alert follow below each sickness.

Without `--runs` the series are simulated (:mod:`benchmarks.simulated_runs`): the median number of
steps from a random onset to the first alert.

Both print the false alarms per 1,000 healthy steps.
"""

import argparse
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recorded_runs
from benchmarks.recorded_runs import RecordedRun
from benchmarks.simulated_runs import SETTINGS, SICKNESSES, WATCHED, Change, Metrics, healthy, sick
from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.metrics import EVAL_SCORE
from engine.monitoring.guardrails import DEFAULT_RULES, Alert, Guardrails


def is_sequential(rule: Rule) -> bool:
    """Whether a rule looks at more than one step against the last ones."""
    several = rule.drifts_up or rule.drifts_down or rule.diverges or rule.predicted_above
    return bool(several or rule.lasts > 1)


THRESHOLDS = [rule for rule in DEFAULT_RULES if not is_sequential(rule)]
SEQUENTIAL = [rule for rule in DEFAULT_RULES if is_sequential(rule)]


def alerts(
    rules: Iterable[Rule],
    steps: Sequence[Metrics],
    judges: Collection[str],
    settings: dict[str, Any],
) -> list[Alert]:
    """Every alert that rules raise over a run's steps."""
    rails = Guardrails(GuardrailConfig(defaults=False, rules=list(rules)), judges)
    return [
        alert
        for step, metrics in enumerate(steps, start=1)
        for alert in rails.check(step, metrics, settings)
    ]


def shown(found: Sequence[float]) -> str:
    """The median of those that are finite, and the share that is not."""
    finite = [d for d in found if math.isfinite(d)]
    if not finite:
        return "never"
    missed = 1 - len(finite) / len(found)
    return f"{statistics.median(finite):.0f}" + (f" ({missed:.0%} never)" if missed else "")


def print_false_alarms(title: str, false: Counter[str], steps: int) -> None:
    """Prints how often rules were wrong."""
    if not steps:
        print(f"{title}: no healthy runs")
        return
    rate = 1000 * false.total() / steps
    rules = ", ".join(f"{name} {count}" for name, count in false.most_common()) or "none"
    print(f"{title}: {rate:.2f} false alarms per 1,000 healthy steps ({steps:,} steps): {rules}")


# -- runs of the starter ---------------------------------------------------------------------------


def first_alerts(rules: Iterable[Rule], run: RecordedRun) -> dict[str, int]:
    """Rule → the step of its first alert."""
    first: dict[str, int] = {}
    for alert in alerts(rules, run.steps, run.judges, run.settings):
        first.setdefault(alert.rule, alert.step)
    return first


def print_recorded(runs: list[RecordedRun]) -> None:
    """Prints the tables of runs of the starter."""
    print(f"{'sickness':<18}{'runs':>5}{'score lost':>18}{'KL passed':>18}", end="")
    print(f"{'thresholds':>18}{'sequential':>18}{'in time':>9}")
    for kind in dict.fromkeys(run.kind for run in runs if not run.healthy):
        _print_sickness(kind, [run for run in runs if run.kind == kind])
    well = [run for run in runs if run.healthy]
    harmed = [f"{r.kind} {r.seed} at {r.harmed():.0f}" for r in well if r.harmed() < math.inf]
    print(f"healthy runs that are harmed by the same measures: {', '.join(harmed) or 'none'}")
    steps = sum(len(run.steps) for run in well)
    for title, rules in (("thresholds", THRESHOLDS), ("sequential", SEQUENTIAL)):
        false = Counter(
            alert.rule
            for run in well
            for alert in alerts(rules, run.steps, run.judges, run.settings)
        )
        print_false_alarms(title, false, steps)
    raised = Counter(
        (run.kind, run.seed, alert.rule)
        for run in runs
        for alert in alerts(DEFAULT_RULES, run.steps, run.judges, run.settings)
    )
    for (kind, seed, rule), most in raised.most_common(1):
        print(f"{raised.total()} alerts in {len(runs)} runs, at most {most} of a rule in one:")
        print(f"    {rule} in {kind} {seed}")


def _print_sickness(kind: str, runs: list[RecordedRun]) -> None:
    first = [first_alerts(DEFAULT_RULES, run) for run in runs]
    cells = [
        shown([run.score_lost() for run in runs]),
        shown([run.kl_passed() for run in runs]),
        *(shown([_earliest(each, rules) for each in first]) for rules in (THRESHOLDS, SEQUENTIAL)),
    ]
    in_time = [
        min(each.values(), default=math.inf) < run.harmed()
        for each, run in zip(first, runs, strict=True)
    ]
    print(f"{kind:<18}{len(runs):>5}{''.join(f'{cell:>18}' for cell in cells)}", end="")
    print(f"{sum(in_time) / len(runs):>9.0%}")
    for rule in DEFAULT_RULES:
        steps = [each.get(rule.name, math.inf) for each in first]
        if min(steps) < math.inf:
            soon = sum(s < r.harmed() for s, r in zip(steps, runs, strict=True)) / len(runs)
            print(f"    {rule.name:<20} {shown(steps):<18} {soon:.0%} in time")


def _earliest(steps: dict[str, int], rules: list[Rule]) -> float:
    return min((steps[rule.name] for rule in rules if rule.name in steps), default=math.inf)


# -- simulated runs --------------------------------------------------------------------------------


def delays(
    rules: list[Rule], change: Change, metrics: frozenset[str], runs: int, steps: int
) -> list[float]:
    """Steps from the onset to the first alert of each run; infinite without one."""
    found = []
    for seed in range(runs):
        run, onset = sick(random.Random(seed), steps, change)
        alerted = [
            alert.step
            for alert in alerts(rules, run, (WATCHED, EVAL_SCORE), SETTINGS)
            if alert.step >= onset and alert.evidence.get("metric") in metrics
        ]
        found.append(min(alerted, default=math.inf) - onset)
    return found


def print_simulated(runs: int, steps: int) -> None:
    """Prints the tables of simulated runs."""
    print(f"{'sickness':<22}{'thresholds, last 20 steps':>28}{'sequential rules':>28}")
    for name, (change, metrics) in SICKNESSES.items():
        cells = [
            shown(delays(rules, change, metrics, runs, steps)) for rules in (THRESHOLDS, SEQUENTIAL)
        ]
        print(f"{name:<22}{cells[0]:>28}{cells[1]:>28}")
    for title, rules in (("thresholds", THRESHOLDS), ("sequential", SEQUENTIAL)):
        false = Counter(
            alert.rule
            for seed in range(1000, 1000 + 5 * runs)
            for alert in alerts(
                rules, healthy(random.Random(seed), steps), (WATCHED, EVAL_SCORE), SETTINGS
            )
        )
        print_false_alarms(title, false, 5 * runs * steps)


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, help="runs.jsonl of benchmarks.sick_runs")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 1000), help="of its runs: from, and up to"
    )
    parser.add_argument("--simulated", type=int, default=40, help="simulated runs of each sickness")
    parser.add_argument("--steps", type=int, default=500, help="steps of a simulated run")
    given = parser.parse_args()
    if given.runs is not None:
        print_recorded(recorded_runs.read(given.runs, range(*given.seeds)))
    else:
        print_simulated(given.simulated, given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
