"""On a GPU: a 0.5 B-shaped policy, against TRL, and decoding against the memory's bandwidth.

    python -m benchmarks.gpu [--iterations 3]

64 prompts of 128 tokens, 256 new tokens, bfloat16 on both sides (TRL's own default). Each side has
the GPU to itself: TRL's logits of a rollout alone take tens of gigabytes.
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
    """Measures and prints; without a GPU it says so and is done."""
    options = argparse.ArgumentParser()
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--no-trl", action="store_true", help="measure our engine alone")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu-bench: torch sees no GPU here, nothing was measured; make bench is for the CPU")
        sys.exit(0)
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), GPU_TASK, given.iterations, with_trl=not given.no_trl)


def compare(folder: Path, task: Task, iterations: int, *, with_trl: bool) -> None:
    """Our engine first, each figure printed as it is known; TRL last, so that it can cost none."""
    write_models(folder, task)
    ours = [str(folder), *settings(task), *HALF]
    peak, bandwidth = machine.matmul_peak(torch.bfloat16), machine.bandwidth_peak()
    print(f"peak        {peak:.0f} GFLOP/s of bfloat16 products, {bandwidth:.0f} GB/s copied\n")
    sides = [
        measured(folder, iterations, "ours, defaults", OURS, ours),
        measured(folder, iterations, "ours, equal work", OURS, [*ours, "model.value=separate"]),
    ]
    print_phases(sides)
    generate = min(i.phases["time/generate"] for i in sides[0].iterations)
    step, least = generate / task.new_tokens, bytes_of_a_token(task) / bandwidth / 1e9
    print(f"decoding    {1000 * step:.2f} ms a token of {task.prompts} responses; to read weights")
    print(f"            and cache once takes {1000 * least:.2f} ms, {least / step:.0%} of that")
    if with_trl:
        arguments = [str(folder), json.dumps(asdict(task)), "bf16"]
        try:
            sides.insert(0, measured(folder, iterations, "TRL", "benchmarks.trl_side", arguments))
        except RuntimeError as error:
            print(f"TRL         {error}")
    print_table(sides, task, peak)


def measured(folder: Path, iterations: int, name: str, module: str, arguments: list[str]) -> Side:
    """One side that has the GPU to itself; a line for each iteration as it ends.

    Arithmetic is not counted: torch's counter rejects attention with fewer key than query heads.
    """
    side = Side(name, module, arguments, folder / f"{name}.log")
    try:
        side.wait_ready()
        for turn in range(iterations + 1):
            done = side.iterate(keep=turn > 0)
            warm_up = "" if turn else " (warm-up)"
            print(f"{name:<18}{done.seconds:.2f} s, {done.peak_gb:.1f} GB{warm_up}", flush=True)
    finally:
        side.close()
    return side


def bytes_of_a_token(task: Task) -> float:
    """What decoding must read for one token of all answers: bfloat16 weights, half-filled cache."""
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
