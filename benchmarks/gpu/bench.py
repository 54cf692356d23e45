"""Measures the engine on a GPU, against the memory bandwidth and against TRL.

    python -m benchmarks.gpu.bench [--iterations 3] [--no-trl]

A policy with the shape of a 0.5 B model, 64 prompts of 128 tokens, 256 new tokens, bfloat16 on both
sides (TRL's default). The sides run one after another, because TRL's logits of a rollout alone take
tens of gigabytes; TRL comes last, and if it fails the other figures are there. Without a GPU the
parts run at a small size on a pretended one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.engine_side import load, settings
from benchmarks.engine_vs_trl import OURS, median_seconds, print_phases, print_table
from benchmarks.gpu.decoding import respond, without_graphs
from benchmarks.gpu.findings import Finding, Part, Target, run_parts, write_results
from benchmarks.side import Side
from benchmarks.task import GPU_TASK, TINY, Task, write_models
from engine.train.rollout.compiled_layers import CompiledLayers
from engine.train.rollout.decoder import GRAPHED
from tests.train.gpu.pretend import GPU, pretend_gpu

HALF = ["model.dtype=bfloat16", "reward.dtype=bfloat16"]
DECODE_SHARE = 0.25
"""Of the bandwidth limit. For this shape the quickest kernels known for the products take twice the
limit together (RESULTS.md)."""
AGAINST_TRL = 3.0
"""Times as fast as TRL by iteration."""
SMALL_TASK = Task(TINY, 4, 8, 8, 1, 1, 4)
"""For a machine without a GPU."""


def main() -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="measure the engine only")
    options = parser.parse_args()
    real = torch.cuda.is_available()
    print(f"{machine.describe()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if not real:
            stack.enter_context(pretend_gpu())
        target = Target(torch.device("cuda", 0) if real else GPU, real, Path(folder))
        task = GPU_TASK if real else SMALL_TASK
        write_models(target.folder, task)
        parts: dict[str, Part] = {"decoding": partial(decoding, task)}
        if real:
            parts["iterations"] = partial(
                iterations, task, options.iterations, with_trl=not options.no_trl
            )
        findings = list(run_parts(parts, target))
    if real:
        print(f"written to {write_results('bench', findings)}")
    else:
        print("no GPU here: decoding ran at a small size on a pretended one")
    return int(any(not f.passed for f in findings))


def decoding(task: Task, target: Target) -> Iterator[Finding]:
    """Milliseconds per token of all responses, against reading weights and cache once."""
    yield decoding_with(task, target, "torch", "never")
    if target.real:  # the compiler does not know a pretended GPU
        yield decoding_with(task, target, "torch", "always")
    if target.real and find_spec("liger_kernel") is not None:
        yield decoding_with(task, target, "liger", "never")


def decoding_with(task: Task, target: Target, kernels: str, compiled: str) -> Finding:
    """The same with a choice of kernels, and compiled (`rollout.compile`) or not."""
    sessions = target.folder / f"decoding-{kernels}-{compiled}"
    sessions.mkdir()
    keys = [*settings(task), *HALF, f"model.kernels={kernels}", f"rollout.compile={compiled}"]
    run = load(target.folder, sessions, keys)
    layers = CompiledLayers(compiled)
    began = time.perf_counter()
    respond(run, task.prompts, task.new_tokens, GRAPHED, never_end=True, compiled=layers)
    first = time.perf_counter() - began
    least = bytes_per_token(task) / machine.bandwidth_peak() / 1e9 if target.real else 0.0

    def milliseconds() -> float:
        times = []
        for _ in range(3 if target.real else 1):
            began = time.perf_counter()
            respond(run, task.prompts, task.new_tokens, GRAPHED, never_end=True, compiled=layers)
            if target.real:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - began) / task.new_tokens)
        return statistics.median(times)

    with_graphs = milliseconds()
    with without_graphs():
        without = milliseconds()
    figures = {
        "ms": with_graphs, "ms_without_graphs": without, "ms_least": 1000 * least,
        "first_seconds": first, "compiled": float(layers.usable and compiled == "always"),
    }  # fmt: skip
    share = 1000 * least / with_graphs
    return Finding(
        f"decoding, kernels of {kernels}, compiled: {compiled}",
        share >= DECODE_SHARE or not target.real or compiled == "never",
        f"{with_graphs:.2f} ms per token of {task.prompts} responses, {without:.2f} ms without "
        f"graphs; reading weights and cache once takes {1000 * least:.2f} ms, {share:.0%}; "
        f"the first batch took {first:.0f} s", figures,
    )  # fmt: skip


def iterations(task: Task, count: int, target: Target, *, with_trl: bool) -> Iterator[Finding]:
    """Whole iterations of the engine and then of TRL, each with the GPU to itself."""
    folder = target.folder
    ours = [str(folder), *settings(task), *HALF]
    peak = machine.matmul_peak(torch.bfloat16)
    print(f"peak        {peak:.0f} GFLOP/s of bfloat16 products")
    sides = [
        measure(folder, count, "ours, defaults", OURS, ours),
        measure(folder, count, "ours, equal work", OURS, [*ours, "model.value=separate"]),
    ]
    if find_spec("liger_kernel") is not None:
        fused = [*ours, "model.kernels=liger"]
        sides.append(measure(folder, count, "ours, fused", OURS, fused))
    print_phases(sides)
    for phase, flop in phase_flop(task).items():
        seconds = statistics.median(i.phases[f"time/{phase}"] for i in sides[0].iterations)
        share = flop / seconds / peak / 1e9
        text = f"{seconds:.2f} s, {share:.0%} of the peak of matrix products"
        yield Finding(f"time of {phase}", True, text, {"seconds": seconds, "share": share})
    if with_trl and find_spec("trl") is None:
        yield Finding("TRL", True, "not installed, so not measured")
    elif with_trl:
        arguments = [str(folder), json.dumps(asdict(task)), "bf16"]
        sides.insert(0, measure(folder, count, "TRL", "benchmarks.trl_side", arguments))
        for side in sides[1:]:
            speed = median_seconds(sides[0]) / median_seconds(side)
            text = f"{speed:.2f} times as fast as TRL, {AGAINST_TRL:g} wanted"
            yield Finding(side.name, speed >= AGAINST_TRL, text, {"speed": speed})
    print_table(sides, task, peak)


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


def parameters(task: Task) -> tuple[int, int]:
    """Weights of the layers, and of the output layer."""
    shape = task.shape
    head = shape.hidden // shape.heads
    attention = shape.hidden * head * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer, shape.vocabulary * shape.hidden


def bytes_per_token(task: Task) -> float:
    """Bytes read to decode one token of all responses: bfloat16 weights and a half-filled cache."""
    shape = task.shape
    length = task.prompt_tokens + task.new_tokens / 2
    head = shape.hidden // shape.heads
    cache = 2 * shape.layers * shape.kv_heads * head * task.prompts * length
    return 2 * (sum(parameters(task)) + cache)


def phase_flop(task: Task) -> dict[str, float]:
    """Operations of the matrix products of the two phases that are bound by them; no attention."""
    layers, head = parameters(task)
    tokens = task.prompts * (task.prompt_tokens + task.new_tokens)
    forward = 2.0 * (tokens * layers + task.response_tokens * head)
    # The reference, and in bfloat16 the policy before the update.
    return {"reference": 2 * forward, "optimise": 3 * task.epochs * forward}


if __name__ == "__main__":
    sys.exit(main())
