"""Measures the engine on a GPU, against the memory bandwidth and against TRL.

    python -m benchmarks.gpu.bench [--only TEXT] [--iterations 3] [--no-trl]

A policy with the shape of a 0.5 B model, 64 prompts of 128 tokens, 256 new tokens, bfloat16 on both
sides (TRL's default). The sides run one after another, because TRL's logits of a rollout alone take
tens of gigabytes. TRL comes last, and the findings so far are written to `benchmarks/results` after
each. Ends with 1 if one failed, and with 2 if there is no such part. Without a GPU the parts run at
a small size on a pretended one, nothing is written, and the last line says that there is none.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.engine_side import settings
from benchmarks.engine_vs_trl import OURS, median_seconds, print_phases, print_table
from benchmarks.gpu import decoding_speed
from benchmarks.gpu.decoding_speed import HALF, parameters
from benchmarks.gpu.findings import Finding, Part, Results, Target, chosen_parts, run_parts
from benchmarks.side import NO_TRL, Side, has_ppo_trainer
from benchmarks.task import GPU_TASK, TINY, Task, write_models
from tests.train.gpu.pretend import GPU, pretend_gpu

AGAINST_TRL = 3.0
"""Times as fast as TRL by iteration."""
SMALL_TASK = Task(TINY, 4, 8, 8, 1, 1, 4)
"""For a machine without a GPU."""


def main() -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name contains it")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="measure the engine only")
    options = parser.parse_args()
    real = torch.cuda.is_available()
    task = GPU_TASK if real else SMALL_TASK
    parts: dict[str, Part] = {
        "decoding": partial(decoding_speed.decoding, task),
        "larger models": partial(decoding_speed.larger_models, task),
        "iterations": partial(iterations, task, options.iterations, with_trl=not options.no_trl),
    }
    chosen = chosen_parts(parts, options.only)
    print(f"{machine.describe()}\n", flush=True)
    results = Results("bench", options.only) if real else None
    if results is not None:
        print(f"results, after each finding: {results.path}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if not real:
            stack.enter_context(pretend_gpu())
        target = Target(torch.device("cuda", 0) if real else GPU, real, Path(folder))
        write_models(target.folder, task)
        findings = list(run_parts(chosen, target, None if results is None else results.add))
    if not real:
        print("no GPU here: the parts ran at a small size on a pretended one")
    return int(any(not f.passed for f in findings))


def iterations(task: Task, count: int, target: Target, *, with_trl: bool) -> Iterator[Finding]:
    """Whole iterations of the engine and then of TRL, each with the GPU to itself."""
    if not target.real:
        yield Finding("iterations", passed=True, measured="need a GPU")
        return
    folder = target.folder
    ours = [str(folder), *settings(task), *HALF]
    peak = machine.matmul_peak(torch.bfloat16)
    print(f"peak        {peak:.0f} GFLOP/s of bfloat16 products")
    variants = {"ours, defaults": ours, "ours, equal work": [*ours, "model.value=separate"]}
    if find_spec("liger_kernel") is not None:
        variants["ours, fused"] = [*ours, "model.kernels=liger"]
    sides: list[Side] = []
    for name, arguments in variants.items():
        sides.append(measure(folder, count, name, OURS, arguments))
        yield iteration_time(sides[-1])
    print_phases(sides)
    for phase, flop in phase_flop(task).items():
        seconds = statistics.median(i.phases[f"time/{phase}"] for i in sides[0].iterations)
        share = flop / seconds / peak / 1e9
        text = f"{seconds:.2f} s, {share:.0%} of the peak of matrix products"
        yield Finding(f"time of {phase}", True, text, {"seconds": seconds, "share": share})
    if with_trl and not has_ppo_trainer():
        yield Finding("TRL", True, f"not measured: {NO_TRL}")
    elif with_trl:
        arguments = [str(folder), json.dumps(asdict(task)), "bf16"]
        sides.insert(0, measure(folder, count, "TRL", "benchmarks.trl_side", arguments))
        yield iteration_time(sides[0])
        for side in sides[1:]:
            speed = median_seconds(sides[0]) / median_seconds(side)
            text = f"{speed:.2f} times as fast as TRL, {AGAINST_TRL:g} wanted"
            yield Finding(side.name, speed >= AGAINST_TRL, text, {"speed": speed})
    print_table(sides, task, peak)


def iteration_time(side: Side) -> Finding:
    """The median time of a side's iterations, and the memory."""
    seconds, memory = median_seconds(side), max(i.peak_gb for i in side.iterations)
    text = f"{seconds:.2f} s, {memory:.1f} GB"
    figures = {"seconds": seconds, "peak_gb": memory}
    return Finding(f"an iteration, {side.name}", True, text, figures)


def measure(folder: Path, iterations: int, name: str, module: str, arguments: list[str]) -> Side:
    """Measures one side, which has the GPU to itself, and prints a line per iteration.

    FLOP are not counted: torch's counter rejects attention with fewer key than query heads.
    """
    side = Side(name, module, arguments, folder / f"{name}.log")
    try:
        side.wait_ready()
        for number in range(iterations + 1):
            iteration = side.iterate(keep=number > 0)
            note = "" if number else " (warm-up)"
            print(
                f"{name:<18}{iteration.seconds:.2f} s, {iteration.peak_gb:.1f} GB{note}", flush=True
            )
    finally:
        side.close()
    return side


def phase_flop(task: Task) -> dict[str, float]:
    """Operations of the matrix products of the two phases that are bound by them; no attention."""
    layers, head = parameters(task)
    tokens = task.prompts * (task.prompt_tokens + task.new_tokens)
    forward = 2.0 * (tokens * layers + task.response_tokens * head)
    # The reference, and in bfloat16 the policy before the update.
    return {"reference": 2 * forward, "optimise": 3 * task.epochs * forward}


if __name__ == "__main__":
    sys.exit(main())
