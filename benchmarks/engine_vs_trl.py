"""Our engine and TRL's PPOTrainer on the same task, taking turns.

    python -m benchmarks.engine_vs_trl [--iterations 3] [--tiny] [--phases]

Three sides, each in its own process: TRL; our engine at TRL's work (a value model of its own,
float32); our engine as it comes. One iteration each in turn, the first round dropped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.engine_side import settings
from benchmarks.side import Side
from benchmarks.task import SMALL_TASK, TINY, Task, write_models
from engine.config.schema import LaunchConfig
from engine.launch.environment import OPENMP_WAITING, rank_environment

EQUAL = ["model.value=separate", "model.dtype=float32", "reward.dtype=float32"]
"""What makes our work TRL's: it trains a value model apart, and computes in float32 as told to."""
OURS = "benchmarks.engine_side"
NEEDED_GB = 19.0
"""All three sides of the 135 M task at once."""


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    options.add_argument("--layers", type=int, help="fewer than the model's 30, to be quicker")
    options.add_argument("--phases", action="store_true", help="also where our seconds go")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for both ours")
    given = options.parse_args()
    task = Task(TINY) if given.tiny else SMALL_TASK
    if given.layers:
        task = replace(task, shape=replace(task.shape, layers=given.layers))
    if task == SMALL_TASK and machine.free_gb() < NEEDED_GB:
        sys.exit(
            f"engine_vs_trl needs {NEEDED_GB:.0f} GB of free memory, here are "
            f"{machine.free_gb():.0f}: close something, or try it with --tiny"
        )
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), task, given.iterations, given.set, phases=given.phases)


def compare(
    folder: Path, task: Task, iterations: int, more: list[str], *, phases: bool = False
) -> None:
    """The table of one task."""
    write_models(folder, task)
    sides = start(folder, task, more)
    try:
        peak = machine.matmul_peak()
        for turn in range(iterations + 1):
            for side in sides:
                done = side.iterate(keep=turn > 0)
                print(f"round {turn}: {side.name} {done.seconds:.1f} s", file=sys.stderr)
        peak = max(peak, machine.matmul_peak())
        for side in sides:
            side.count()
    finally:
        for side in sides:
            side.close()
    print(f"peak        {peak:.0f} GFLOP/s of float32 matrix products")
    print(f"task        {task.prompts} prompts of {task.prompt_tokens} tokens, {task.new_tokens} "
          f"new tokens, {task.epochs} epochs, {task.minibatches} minibatch, micro-batch "
          f"{task.micro_batch}; medians of {iterations}\n")  # fmt: skip
    print_table(sides, task, peak)
    if phases:
        print_phases(sides)


def start(folder: Path, task: Task, more: list[str]) -> list[Side]:
    """TRL, ours at equal work, ours as it comes; loaded one after another."""
    trl = ("benchmarks.trl_side", [str(folder), json.dumps(asdict(task))])
    equal = (OURS, [str(folder), *settings(task), *EQUAL, *more])
    defaults = (OURS, [str(folder), *settings(task), *more])
    # Threads that wait as our launcher has them: as libgomp has them, spinning would cost TRL more
    # than anything else on a machine that others use.
    theirs = OPENMP_WAITING | os.environ
    own = rank_environment(LaunchConfig(nice=0))
    sides = []
    for name, (module, arguments), given in (
        ("TRL", trl, theirs), ("ours, equal work", equal, own), ("ours, defaults", defaults, own)
    ):  # fmt: skip
        sides.append(Side(name, module, arguments, folder / f"{name}.log", given))
        sides[-1].wait_ready()
    return sides


def print_table(sides: list[Side], task: Task, peak: float) -> None:
    """One line a side."""
    first = sides[0]
    base = median_seconds(first), median_cpu(first), peak_gb(first)
    print(f"{'':<18}{'s/iteration':>22}{'CPU s':>8}{'tokens/s':>10}{'GB':>7}{'GFLOP':>8}"
          f"{'of peak':>9}{'speed':>8}{'by CPU':>8}{'memory':>8}")  # fmt: skip
    for side in sides:
        seconds, cpu, gb = median_seconds(side), median_cpu(side), peak_gb(side)
        every = [i.seconds for i in side.iterations]
        times = f"{seconds:.2f} ({min(every):.2f}–{max(every):.2f})"
        print(f"{side.name:<18}{times:>22}{cpu:>8.1f}{task.answer_tokens / seconds:>10.1f}"
              f"{gb:>7.2f}{arithmetic(side, seconds, peak)}"
              f"{base[0] / seconds:>7.2f}x{base[1] / cpu:>7.2f}x{gb / base[2]:>7.2f}x")  # fmt: skip


def arithmetic(side: Side, seconds: float, peak: float) -> str:
    """Two columns: GFLOP, and the share of the peak; empty where they were not counted."""
    if not side.gflop:
        return f"{'–':>8}{'–':>9}"
    return f"{side.gflop:>8.0f}{side.gflop / seconds / peak:>9.0%}"


def print_phases(sides: list[Side]) -> None:
    """Medians of each phase, of the sides that tell."""
    for side in sides:
        names = side.iterations[0].phases
        parts = [
            f"{n.partition('/')[2]} {statistics.median(i.phases[n] for i in side.iterations):.2f}"
            for n in names
        ]
        if parts:
            print(f"{side.name:<18}{', '.join(parts)}")


def median_seconds(side: Side) -> float:
    """Of the iterations kept."""
    return statistics.median(i.seconds for i in side.iterations)


def median_cpu(side: Side) -> float:
    """Of the iterations kept: seconds of processor time."""
    return statistics.median(i.cpu for i in side.iterations)


def peak_gb(side: Side) -> float:
    """Of the whole life of the process."""
    return max(i.peak_gb for i in side.iterations)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
