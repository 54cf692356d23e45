"""Starts a script of this folder as the ranks of a group.

A process needs seconds of processor time to import torch and transformers, more than most scripts
need for their work. So the ranks are forked from a server of :mod:`multiprocessing`, which has
imported them once per process of pytest and computes nothing itself.
"""

import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from engine.launch.environment import STORE_VARIABLE

PRELOADED = ["engine.train.load", "engine.train.step", "engine.train.evaluation.evaluate"]
DEADLINE = 400
"""Seconds; generous, for a busy machine."""
GRACE = 20
"""Seconds that the other ranks have after one has failed."""


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended."""

    code: int
    """0 if all of them ended well."""
    output: str
    """What they printed, rank by rank."""


def run_ranks(count, script, *words, folder):
    """Runs `python SCRIPT WORDS...` on `count` ranks, with torchrun's variables.

    `folder` gets the output of each rank and the file of their store.
    """
    started = f"{Path(script).stem}-{time.monotonic_ns()}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    outputs = [folder / f"{started}-{i}.txt" for i in range(count)]
    ranks = [
        context.Process(
            target=_run,
            args=(
                (str(script), *map(str, words)),
                i,
                count,
                str(folder / started),
                str(output),
            ),
        )
        for i, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    _wait_for(ranks)
    codes = [rank.exitcode for rank in ranks]
    printed = [
        f"--- rank {i}: exit code {code}\n{output.read_text(errors='replace')}"
        for i, (code, output) in enumerate(zip(codes, outputs, strict=True))
        if output.exists()
    ]
    return Outcome(next((code for code in codes if code), 0), "".join(printed))


def _wait_for(ranks):
    deadline = time.monotonic() + DEADLINE
    running = {rank.sentinel: rank for rank in ranks}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=left):
            rank = running.pop(sentinel)
            rank.join()
            if rank.exitcode:  # the others wait for it in vain
                deadline = min(deadline, time.monotonic() + GRACE)
    for rank in running.values():
        rank.kill()
        rank.join()


def _run(command, rank, count, store, output):
    with open(output, "wb", buffering=0) as file:  # noqa: PTH123 - for its descriptor
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # Here and not at the top: the processes of pytest that start no ranks need not import it.
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)  # models this small gain nothing from more
    if count > 1:
        os.environ |= {
            STORE_VARIABLE: f"file:{store}.store",
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        }  # fmt: skip
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
