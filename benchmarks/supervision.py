"""What supervision costs: journal, link, telemetry, samples with per-token arrays, guard rails.

    python -m benchmarks.supervision [--steps 10] [--rounds 12]

The same steps, of a second or so, by a rank's own code alone and by a whole supervised run, in
pairs of fresh processes; which one comes first alternates. Two processes that do the same differ by
more than supervision costs, so the mean over many pairs counts, with its standard error. The parts
are also counted inside the supervised run: what of each step's period was not the step, and the
processor time of the supervisor.
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
from engine.config.schema import LaunchConfig
from engine.journal.reader import JournalReader
from engine.launch.environment import rank_environment
from engine.session.folder import Session

TASK = Task(replace(TINY, hidden=256, intermediate=768, layers=6), 32, 16, 32, 3, 2, 16)
"""About a second a step on two cores."""
ALL_OF_IT = ["log.tensorboard=true", "log.samples=16", "log.arrays=4"]


@dataclass
class Supervised:
    """What one supervised run's journal and processes say."""

    periods: list[float]
    """Seconds from one step's report to the next's."""
    steps: list[float]
    """Seconds of the steps themselves, `time/step`."""
    supervisor_cpu: float
    """Seconds of the supervisor's processor time for each step."""


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--rounds", type=int, default=12)
    given = options.parse_args()
    print(machine.describe())
    bare: list[list[float]] = []
    runs: list[Supervised] = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), TASK)
        for turn in range(given.rounds):
            if turn % 2:
                runs.append(supervised(Path(folder), f"s{turn}", given.steps))
            bare.append(bare_steps(Path(folder), given.steps))
            if not turn % 2:
                runs.append(supervised(Path(folder), f"s{turn}", given.steps))
    report(bare, runs)


def bare_steps(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of a rank without a supervisor, the first left out."""
    own = rank_environment(LaunchConfig(nice=0))
    side = Side(
        "bare", "benchmarks.engine_side", [str(folder), *settings(TASK)], folder / "bare.log", own
    )
    try:
        side.wait_ready()
        for step in range(steps):
            side.iterate(keep=step > 0)
    finally:
        side.close()
    return [i.seconds for i in side.iterations]


def supervised(folder: Path, name: str, steps: int) -> Supervised:
    """The same by `rlhf-tui run --headless`, everything on."""
    file = folder / "supervised.yaml"
    file.write_text(YAML.format(folder=folder.resolve()))
    given = [*settings(TASK), *ALL_OF_IT, f"train.steps={steps}", "launch.nice=0"]
    command = [sys.executable, "-m", "rlhf_tui.cli", "run", str(file), "--headless",
               "--name", name, "--sessions", str(folder / "sessions")]  # fmt: skip
    for setting in given:
        command += ["-o", setting]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        cpu = _watch(process, Session(folder / "sessions" / name), steps)
    if process.returncode:
        raise RuntimeError((folder / f"{name}.log").read_text(errors="replace")[-2000:])
    with JournalReader(Session(folder / "sessions" / name)) as record:
        rows = record.metrics()
    times = [row.time for row in rows]
    periods = [b - a for a, b in itertools.pairwise(times)]
    return Supervised(periods, [row.values["time/step"] or 0.0 for row in rows[1:]], cpu)


def _watch(process: subprocess.Popen[bytes], session: Session, steps: int) -> float:
    """The supervisor's processor time a step, between the first step and the last."""
    first = last = (0, 0.0)
    while process.poll() is None:
        time.sleep(0.2)
        with JournalReader(session) as record:
            step = record.last_step()
        stat = Path(f"/proc/{process.pid}/stat")
        if step and stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()
            now = (step, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
            first, last = (first if first[0] else now), (now if step < steps else last)
    return (last[1] - first[1]) / max(1, last[0] - first[0])


def report(bare: list[list[float]], runs: list[Supervised]) -> None:
    """The table."""
    without = statistics.median(itertools.chain(*bare))
    with_it = statistics.median(p for run in runs for p in run.periods)
    more = [
        statistics.median(run.periods) / statistics.median(alone) - 1
        for alone, run in zip(bare, runs, strict=True)
    ]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else float("nan")
    between = statistics.median(
        p - s for run in runs for p, s in zip(run.periods, run.steps, strict=True)
    )
    cpu = statistics.mean(run.supervisor_cpu for run in runs)
    share = cpu / (len(os.sched_getaffinity(0)) * with_it)
    print(f"without supervision   {without:.3f} s a step, the median of {len(bare)} processes")
    print(f"with supervision      {with_it:.3f} s a step")
    print(f"by pairs              {statistics.mean(more):+.2%}, standard error {error:.2%}; "
          f"from {min(more):+.2%} to {max(more):+.2%}")  # fmt: skip
    print(f"between two steps     {1000 * between:.1f} ms, {between / with_it:.2%} of the period")
    print(f"supervisor            {1000 * cpu:.1f} ms of processor time a step, "
          f"{share:.2%} of the machine's")  # fmt: skip
    print(f"by its parts          {between / with_it + share:.2%} of the step")


if __name__ == "__main__":
    main()
