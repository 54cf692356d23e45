"""Compares the engine with TRL on a GPU, and decoding with the memory bandwidth.

    python -m benchmarks.gpu [--iterations 3]

A policy with the shape of a 0.5 B model, 64 prompts of 128 tokens, 256 new tokens, bfloat16 on both
sides (TRL's default). The sides run one after another, because TRL's logits of a rollout alone take
tens of gigabytes.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.engine_side import settings
from benchmarks.engine_vs_trl import OURS, print_phases, print_table
from benchmarks.side import Side
from benchmarks.task import GPU_TASK, Task, write_models

HALF = ["model.dtype=bfloat16", "reward.dtype=bfloat16"]


def main() -> None:
    """Runs the comparison and prints the table; without a GPU it prints a message and exits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="measure the engine only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-bench: torch finds no GPU, nothing was measured; use make bench on a CPU")
        sys.exit(0)
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), GPU_TASK, options.iterations, with_trl=not options.no_trl)


def compare(folder: Path, task: Task, iterations: int, *, with_trl: bool) -> None:
    """Measures the engine and then TRL, and prints each figure at once.

    TRL comes last: if it runs out of memory, the other figures are printed already.
    """
    write_models(folder, task)
    ours = [str(folder), *settings(task), *HALF]
    peak, bandwidth = machine.matmul_peak(torch.bfloat16), machine.bandwidth_peak()
    print(f"peak        {peak:.0f} GFLOP/s of bfloat16 products, {bandwidth:.0f} GB/s copied\n")
    sides = [
        measure(folder, iterations, "ours, defaults", OURS, ours),
        measure(folder, iterations, "ours, equal work", OURS, [*ours, "model.value=separate"]),
    ]
    print_phases(sides)
    generate = min(i.phases["time/generate"] for i in sides[0].iterations)
    step, least = generate / task.new_tokens, bytes_per_token(task) / bandwidth / 1e9
    print(
        f"decoding    {1000 * step:.2f} ms per token of {task.prompts} responses; reading weights"
    )
    print(f"            and cache once takes {1000 * least:.2f} ms, {least / step:.0%} of that")
    if with_trl:
        arguments = [str(folder), json.dumps(asdict(task)), "bf16"]
        try:
            sides.insert(0, measure(folder, iterations, "TRL", "benchmarks.trl_side", arguments))
        except RuntimeError as error:
            print(f"TRL         {error}")
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


def bytes_per_token(task: Task) -> float:
    """Bytes read to decode one token of all responses: bfloat16 weights and a half-filled cache."""
    shape = task.shape
    head = shape.hidden // shape.heads
    attention = shape.hidden * head * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    weights = shape.layers * layer + shape.vocabulary * shape.hidden
    length = task.prompt_tokens + task.new_tokens / 2
    cache = 2 * shape.layers * shape.kv_heads * head * task.prompts * length
    return 2 * (weights + cache)


if __name__ == "__main__":
    main()
