"""Checks on a GPU what a machine without one can only pretend.

    python -m benchmarks.gpu.check [--only TEXT]

Needs PyTorch 2.9 or later and no network. Prints a line per finding, writes those so far to
`benchmarks/results` after each, and ends with 1 if one failed, and with 2 if there is no such part.
On a machine without a GPU all parts run at a small size on a pretended one, nothing is written, and
the last line says that there is none.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu import (
    architectures,
    decoding,
    low_precision,
    numerics,
    variants,
    weights_transfer,
    whole_runs,
)
from benchmarks.gpu.findings import Finding, Part, Results, Target, chosen_parts, run_parts
from tests.train.gpu.pretend import GPU, pretend_gpu

IN_PROCESS: dict[str, Part] = {
    "recorded step": numerics.recorded_step,
    "bfloat16": numerics.bfloat16_gap,
    "8-bit moments": low_precision.eight_bit_moments,
    "QLoRA": low_precision.four_bit_weights,
    "sampling": numerics.sampled_distribution,
    "decoding": decoding.same_tokens,
    "conversations": variants.conversations,
    "variants": variants.variants,
    "reward masks": variants.reward_masks,
    "architectures": architectures.architectures,
    "FSDP2": whole_runs.sharded_on_one,
    # Last: liger replaces an architecture's rotary embeddings for the whole process.
    "fused kernels": numerics.fused_kernels,
}
"""Parts that compute in this process, so that the device can be pretended."""
OTHER_PROCESSES: dict[str, Part] = {
    "weights to another process": weights_transfer.weights_to_another_process,
}
"""Parts that start processes of their own, which cannot pretend."""
WHOLE_RUNS: dict[str, Part] = {
    "starter": whole_runs.starter_learns,
    "kill and resume": whole_runs.killed_and_resumed,
    "two ranks": whole_runs.two_ranks,
    "planner": whole_runs.planner,
}
"""Parts that start programs and wait for them: they run beside those in this process."""
ALONE: dict[str, Part] = {"out of memory": whole_runs.out_of_memory}
"""Parts that need the whole GPU."""


def check(parts: dict[str, Part], folder: Path, results: Results | None = None) -> list[Finding]:
    """Runs some parts on the GPU, or on a pretended one where there is none."""
    real = torch.cuda.is_available()
    with ExitStack() as stack:
        if not real and any(name in IN_PROCESS for name in parts):
            stack.enter_context(pretend_gpu())
        device = torch.device("cuda", 0) if real else GPU
        keep = None if results is None else results.add
        return list(run_parts(parts, Target(device, real, folder), keep))


def main() -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name contains it")
    options = parser.parse_args()
    real = torch.cuda.is_available()
    chosen = chosen_parts(IN_PROCESS | OTHER_PROCESSES | WHOLE_RUNS | ALONE, options.only)
    print(f"{machine.describe()}\n", flush=True)
    results = Results("check", options.only) if real else None
    if results is not None:
        print(f"results, after each finding: {results.path}\n", flush=True)
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        here, programs, alone = (
            {name: part for name, part in group.items() if name in chosen}
            for group in (IN_PROCESS, OTHER_PROCESSES | WHOLE_RUNS, ALONE)
        )
        # A pretended GPU is a state of this process: the parts then run one after another.
        apart = [{name: part} for name, part in programs.items()] if real else []
        with ThreadPoolExecutor() as beside:
            waiting = [beside.submit(check, part, Path(folder), results) for part in apart]
            findings += check(here if real else here | programs, Path(folder), results)
            findings += [finding for done in waiting for finding in done.result()]
        findings += check(alone, Path(folder), results)
    failed = [f.name for f in findings if not f.passed]
    print(f"\n{len(findings) - len(failed)} of {len(findings)} as they should be")
    for name in failed:
        print(f"not: {name}")
    if not real:
        print("no GPU here: the parts ran at a small size on a pretended one")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
