"""Measures the start of a run with a million prompts, and the memory that they take.

    python -m benchmarks.prompts [--prompts 1000000] [--few 100]

A run of the starter takes one step, in processes one after another: with a few prompts, with many
for the first time, with many again, when they are in the cache, and with a few again. The seconds
are from the start of the process to the end of its first step. The memory is the
process's peak; its own part is without pages of memory-mapped files, which the kernel takes back
when it needs them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import machine
from engine import starter
from engine.config import file as config_file
from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import rank_environment

WORDS = ["the", "film", "was", "fine", "and", "nobody", "would", "have", "seen", "it", "twice"]
SETTINGS = [
    "rollout.batch_size=8", "rollout.max_new_tokens=8", "ppo.micro_batch_size=8",
    "ppo.minibatches=1", "ppo.epochs=1", "launch.threads=1", "kl.controller=fixed",
    "reward.normalise=none",
]  # fmt: skip
INTERVAL = 0.05
"""Seconds between looks at the process's memory."""


@dataclass
class Start:
    """One start."""

    seconds: float
    cpu: float
    """Processor time."""
    prompts: float
    """Seconds for the prompts alone."""
    prompts_cpu: float
    """Processor time for these."""
    peak: float
    """Of the resident memory, in MB."""
    own: float
    """The largest part of it that no file backs, in MB."""


def main() -> None:
    """Runs the four starts and prints a table; with `--start`, is one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        sys.stdout.write(f"{' '.join(map(str, start(options.start)))}\n")
        sys.stdout.flush()
        os._exit(0)
    print(machine.describe(), "\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (write_rows(folder, count) for count in (options.few, options.prompts))
        size = many.stat().st_size / 1e6
        print(f"{options.prompts:,} prompts in {size:,.0f} MB of JSON Lines")
        print(f"{'start':<28}{'s':>8}{'CPU s':>8}{'prompts':>9}{'CPU s':>8}{'peak MB':>9}"
              f"{'own MB':>8}")  # fmt: skip
        for title, path in (
            (f"{options.few:,} prompts", few),
            (f"{options.prompts:,}, first start", many),
            (f"{options.prompts:,}, second start", many),
            (f"{options.few:,} prompts again", few),
        ):
            found = measure(path, folder)
            times = f"{found.seconds:>8.1f}{found.cpu:>8.1f}{found.prompts:>9.1f}"
            rest = f"{found.prompts_cpu:>8.1f}{found.peak:>9.0f}{found.own:>8.0f}"
            print(f"{title:<28}{times}{rest}", flush=True)
        cached = sum(f.stat().st_size for f in (folder / "cache").rglob("*") if f.is_file())
        print(f"the cache has {cached / 1e6:,.0f} MB")


def write_rows(folder: Path, count: int) -> Path:
    """A file of prompts of some 25 words, with a column for reward functions."""
    path, draw = folder / f"{count}.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=25))
            file.write(json.dumps({"prompt": f"{number} {text}", "answer": number}) + "\n")
    return path


def write_configuration(prompts: Path, folder: Path) -> Path:
    """The configuration of a start with a file of prompts."""
    config = config_file.load(
        starter.FOLDER / "demo.yaml",
        [*SETTINGS, f"data.prompts={prompts}", f"data.cache={folder / 'cache'}"],
    )
    file = folder / "config.yaml"
    file.write_text(config_file.dump(config), encoding="utf-8")
    return file


def measure(prompts: Path, folder: Path) -> Start:
    """Starts a process that takes a step, and watches its memory."""
    file = write_configuration(prompts, folder)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.prompts", "--start", str(file)],
        env=os.environ | rank_environment(LaunchConfig(nice=0)) | {"HF_HOME": str(folder / "hf")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peaks = [0.0, 0.0]
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peaks))
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"a start failed: {output}")
    numbers = [float(number) for number in output.split()[-3:]]
    return Start(seconds, *numbers, *(peak / 1e6 for peak in peaks))


def _watch(process: psutil.Process, peaks: list[float]) -> None:
    try:
        while process.status() != psutil.STATUS_ZOMBIE:
            memory = process.memory_info()
            peaks[0] = max(peaks[0], memory.rss)
            peaks[1] = max(peaks[1], memory.rss - memory.shared)
            time.sleep(INTERVAL)
    except psutil.Error:  # it has ended
        return


def start(file: Path) -> tuple[float, float, float]:
    """Loads a run and takes a step, as a rank does.

    Returns:
        The processor time of all, the seconds for the prompts, and the processor time for these.
    """
    from engine.protocol.rank_messages import Begin  # noqa: PLC0415 - imports torch
    from engine.session.folder import create  # noqa: PLC0415
    from engine.train.distributed.ranks import RankGroup  # noqa: PLC0415
    from engine.train.load import load_run  # noqa: PLC0415
    from engine.train.step import train_step  # noqa: PLC0415

    config = config_file.load(file)
    stages: dict[str, tuple[float, float]] = {}

    def announce(_step: int, name: str, *_progress: int) -> Callable[[int, int], None]:
        stages.setdefault(name, (time.perf_counter(), time.process_time()))
        return lambda _done, _total: None

    with tempfile.TemporaryDirectory() as folder:
        session = create(Path(folder), "start", config)
        run = load_run(session, config, Begin(attempt=1, from_step=0), RankGroup(config.launch),
                       announce)  # fmt: skip
        train_step(run, 1)
    (end, cpu_end), (begin, cpu_begin) = stages["load reward"], stages["load prompts"]
    return time.process_time(), end - begin, cpu_end - cpu_begin


if __name__ == "__main__":
    main()
