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
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu-bench: torch sees no GPU here, nothing was measured; make bench is for the CPU")
        sys.exit(0)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), GPU_TASK, given.iterations)


def compare(folder: Path, task: Task, iterations: int) -> None:
    """The table, and the decoding step's share of the bandwidth."""
    write_models(folder, task)
    ours = [str(folder), *settings(task), *HALF]
    sides = []
    for name, module, arguments in (
        ("TRL", "benchmarks.trl_side", [str(folder), json.dumps(asdict(task)), "bf16"]),
        ("ours, equal work", OURS, [*ours, "model.value=separate"]),
        ("ours, defaults", OURS, ours),
    ):
        side = Side(name, module, arguments, folder / f"{name}.log")
        try:
            side.wait_ready()
            for turn in range(iterations + 1):
                side.iterate(keep=turn > 0)
            side.count()
        finally:
            side.close()
        sides.append(side)
    peak, bandwidth = machine.matmul_peak(torch.bfloat16), machine.bandwidth_peak()
    print(f"peak        {peak:.0f} GFLOP/s of bfloat16 products, {bandwidth:.0f} GB/s copied\n")
    print_table(sides, task, peak)
    print_phases(sides)
    generate = min(i.phases["time/generate"] for i in sides[-1].iterations)
    step, least = generate / task.new_tokens, bytes_of_a_token(task) / bandwidth / 1e9
    print(f"decoding    {1000 * step:.2f} ms a token of {task.prompts} answers; to read weights")
    print(f"            and cache once takes {1000 * least:.2f} ms, {least / step:.0%} of that")


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
