"""Compares the engine with TRL's PPOTrainer on the same task.

    python -m benchmarks.engine_vs_trl [--iterations 3] [--tiny] [--phases]

Three sides run in processes of their own: TRL; the engine with TRL's workload (a separate value
model, float32); the engine with its defaults. They do one iteration each in turn. The first round
is a warm-up and is not counted.
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
from benchmarks.side import NO_TRL, Side, has_ppo_trainer
from benchmarks.task import SMALL_TASK, TINY, Task, write_models
from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import rank_environment

EQUAL = ["model.value=separate", "model.dtype=float32", "reward.dtype=float32"]
"""Settings that give the engine TRL's workload: a separate value model and float32."""
OURS = "benchmarks.engine_side"
NEEDED_GB = 19.0
"""Memory for all three sides of the 135 M task together."""


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument(
        "--layers", type=int, help="fewer layers than the model's 30, for a quick run"
    )
    parser.add_argument("--phases", action="store_true", help="print the engine's seconds by phase")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both engine sides"
    )
    options = parser.parse_args()
    if not has_ppo_trainer():
        sys.exit(NO_TRL)
    task = Task(TINY) if options.tiny else SMALL_TASK
    if options.layers:
        task = replace(task, shape=replace(task.shape, layers=options.layers))
    if task == SMALL_TASK and machine.free_gb() < NEEDED_GB:
        sys.exit(
            f"engine_vs_trl needs {NEEDED_GB:.0f} GB of free memory, but only "
            f"{machine.free_gb():.0f} GB are free: close other programs, or use --tiny"
        )
    print(machine.describe())
    if not torch.cuda.is_available():
        print(machine.cpu_case())
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), task, options.iterations, options.set, phases=options.phases)


def compare(
    folder: Path, task: Task, iterations: int, extra: list[str], *, phases: bool = False
) -> None:
    """Measures one task and prints its table; `extra` are settings of both engine sides."""
    write_models(folder, task)
    sides = start(folder, task, extra)
    try:
        peak = machine.matmul_peak()
        for number in range(iterations + 1):
            for side in sides:
                iteration = side.iterate(keep=number > 0)
                print(f"round {number}: {side.name} {iteration.seconds:.1f} s", file=sys.stderr)
        peak = max(peak, machine.matmul_peak())
        for side in sides:
            side.count_flop()
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


def start(folder: Path, task: Task, extra: list[str]) -> list[Side]:
    """Starts TRL, the engine with equal work, and the engine with defaults, one after another."""
    trl = ("benchmarks.trl_side", [str(folder), json.dumps(asdict(task))])
    equal = (OURS, [str(folder), *settings(task), *EQUAL, *extra])
    defaults = (OURS, [str(folder), *settings(task), *extra])
    # Each side waits as its users' do: TRL's threads spin as long as libgomp's do by default.
    ours = rank_environment(LaunchConfig(nice=0), ranks=1)
    sides = []
    for name, (module, arguments), environment in (
        ("TRL", trl, dict(os.environ)),
        ("ours, equal work", equal, ours),
        ("ours, defaults", defaults, ours),
    ):
        sides.append(Side(name, module, arguments, folder / f"{name}.log", environment))
        sides[-1].wait_ready()
    return sides


def print_table(sides: list[Side], task: Task, peak: float) -> None:
    """Prints one row per side; ratios are relative to the first side."""
    first = sides[0]
    base = median_seconds(first), median_cpu(first), peak_gb(first)
    print(f"{'':<18}{'s/iteration':>22}{'CPU s':>8}{'tokens/s':>10}{'GB':>7}{'GFLOP':>8}"
          f"{'of peak':>9}{'speed':>8}{'by CPU':>8}{'memory':>8}")  # fmt: skip
    for side in sides:
        seconds, cpu, gb = median_seconds(side), median_cpu(side), peak_gb(side)
        all_seconds = [i.seconds for i in side.iterations]
        times = f"{seconds:.2f} ({min(all_seconds):.2f}–{max(all_seconds):.2f})"
        print(f"{side.name:<18}{times:>22}{cpu:>8.1f}{task.response_tokens / seconds:>10.1f}"
              f"{gb:>7.2f}{arithmetic(side, seconds, peak)}"
              f"{base[0] / seconds:>7.2f}x{base[1] / cpu:>7.2f}x{gb / base[2]:>7.2f}x")  # fmt: skip


def arithmetic(side: Side, seconds: float, peak: float) -> str:
    """Two columns: GFLOP, and the share of the peak; empty where they were not counted."""
    if not side.gflop:
        return f"{'–':>8}{'–':>9}"
    return f"{side.gflop:>8.0f}{side.gflop / seconds / peak:>9.0%}"


def print_phases(sides: list[Side]) -> None:
    """Prints the median seconds of each phase, for the sides that report phases."""
    for side in sides:
        names = side.iterations[0].phases
        parts = [
            f"{n.partition('/')[2]} {statistics.median(i.phases[n] for i in side.iterations):.2f}"
            for n in names
        ]
        if parts:
            print(f"{side.name:<18}{', '.join(parts)}")


def median_seconds(side: Side) -> float:
    """Median seconds of the kept iterations."""
    return statistics.median(i.seconds for i in side.iterations)


def median_cpu(side: Side) -> float:
    """Median processor time of the kept iterations, in seconds."""
    return statistics.median(i.cpu for i in side.iterations)


def peak_gb(side: Side) -> float:
    """Peak memory of the process, loading included."""
    return max(i.peak_gb for i in side.iterations)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
