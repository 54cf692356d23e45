"""Measures the cost of supervision: journal, link, telemetry, samples, guard rails.

    python -m benchmarks.supervision [--steps 10] [--rounds 12]

The same steps of about a second are run by the code of a rank alone and by a supervised run, in
pairs of new processes whose order alternates. Two identical processes differ by more than the cost
of supervision, so the result is the mean over many pairs with its standard error. The cost is also
measured inside the supervised run: the time between two steps, and the processor time of the
supervisor.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import machine
from benchmarks.engine_side import YAML, settings
from benchmarks.side import Side
from benchmarks.task import TINY, Task, write_models
from engine.config.sections.launch import LaunchConfig
from engine.journal.reader import JournalReader
from engine.launch.environment import rank_environment
from engine.session.folder import SessionFolder

TASK = Task(replace(TINY, hidden=256, intermediate=768, layers=6), 32, 16, 32, 3, 2, 16)
"""About a second per step on two cores."""
LOGGING = ["log.tensorboard=true", "log.samples=16", "log.arrays=4"]


@dataclass
class Supervised:
    """The measurements of one supervised run."""

    periods: list[float]
    """Seconds between the reports of two successive steps."""
    steps: list[float]
    """Seconds of the steps themselves, `time/step`."""
    supervisor_cpu: float
    """Processor time of the supervisor in seconds per step."""


def main() -> None:
    """Runs all pairs and prints the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    print(machine.describe())
    bare: list[list[float]] = []
    runs: list[Supervised] = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), TASK)
        for number in range(options.rounds):
            if number % 2:
                runs.append(run_supervised(Path(folder), f"s{number}", options.steps))
            bare.append(run_bare(Path(folder), options.steps))
            if not number % 2:
                runs.append(run_supervised(Path(folder), f"s{number}", options.steps))
    report(bare, runs)


def run_bare(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of a rank without a supervisor, except the first step."""
    environment = rank_environment(LaunchConfig(nice=0))
    arguments = [str(folder), *settings(TASK)]
    side = Side("bare", "benchmarks.engine_side", arguments, folder / "bare.log", environment)
    try:
        side.wait_ready()
        for step in range(steps):
            side.iterate(keep=step > 0)
    finally:
        side.close()
    return [i.seconds for i in side.iterations]


def run_supervised(folder: Path, name: str, steps: int) -> Supervised:
    """Runs the same steps with `rlhf-tui run --headless` and all logging."""
    file = folder / "supervised.yaml"
    file.write_text(YAML.format(folder=folder.resolve()))
    overrides = [*settings(TASK), *LOGGING, f"train.steps={steps}", "launch.nice=0"]
    command = [sys.executable, "-m", "rlhf_tui.cli", "run", str(file), "--headless",
               "--name", name, "--sessions", str(folder / "sessions")]  # fmt: skip
    for override in overrides:
        command += ["-o", override]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        cpu = _supervisor_cpu(process, SessionFolder(folder / "sessions" / name), steps)
    if process.returncode:
        raise RuntimeError((folder / f"{name}.log").read_text(errors="replace")[-2000:])
    with JournalReader(SessionFolder(folder / "sessions" / name)) as reader:
        rows = reader.metrics.rows()
    times = [row.time for row in rows if row.time is not None]
    periods = [b - a for a, b in itertools.pairwise(times)]
    return Supervised(periods, [row.values["time/step"] or 0.0 for row in rows[1:]], cpu)


def _supervisor_cpu(process: subprocess.Popen[bytes], session: SessionFolder, steps: int) -> float:
    """Waits for the run to end; returns the supervisor's processor time in seconds per step."""
    first = last = (0, 0.0)
    while process.poll() is None:
        time.sleep(0.2)
        with JournalReader(session) as reader:
            step = reader.last_step()
        stat = Path(f"/proc/{process.pid}/stat")
        if step and stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()
            now = (step, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
            first, last = (first if first[0] else now), (now if step < steps else last)
    return (last[1] - first[1]) / max(1, last[0] - first[0])


def report(bare: list[list[float]], runs: list[Supervised]) -> None:
    """Prints the result."""
    without = statistics.median(itertools.chain(*bare))
    with_it = statistics.median(p for run in runs for p in run.periods)
    differences = [
        statistics.median(run.periods) / statistics.median(alone) - 1
        for alone, run in zip(bare, runs, strict=True)
    ]
    count = len(differences)
    error = statistics.stdev(differences) / count**0.5 if count > 1 else float("nan")
    between = statistics.median(
        p - s for run in runs for p, s in zip(run.periods, run.steps, strict=True)
    )
    cpu = statistics.mean(run.supervisor_cpu for run in runs)
    share = cpu / (len(os.sched_getaffinity(0)) * with_it)
    print(f"without supervision   {without:.3f} s per step, median of {len(bare)} processes")
    print(f"with supervision      {with_it:.3f} s per step")
    print(f"difference of pairs   {statistics.mean(differences):+.2%}, standard error {error:.2%}; "
          f"from {min(differences):+.2%} to {max(differences):+.2%}")  # fmt: skip
    print(f"between two steps     {1000 * between:.1f} ms, {between / with_it:.2%} of the period")
    print(f"supervisor            {1000 * cpu:.1f} ms of processor time per step, "
          f"{share:.2%} of the machine's")  # fmt: skip
    print(f"sum of the parts      {between / with_it + share:.2%} of the step")


if __name__ == "__main__":
    main()
