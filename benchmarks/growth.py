"""Measures how cost grows with batch, length and vocabulary, and with the size of a journal.

    python -m benchmarks.growth [--steps 100000] [--samples 500000] [--only step|journal]

Steps of a small model are run by the code of a rank; the base and its variants take turns. Journals
of three sizes (a hundredth, a tenth and all of the steps) are queried in the same ways.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import machine
from benchmarks.engine_side import settings
from benchmarks.side import Side
from benchmarks.task import TINY, Task, write_models
from engine import starter
from engine.config import file as config_file
from engine.config.sections.launch import LaunchConfig
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from engine.launch.environment import rank_environment
from engine.protocol.rank_messages import Sample, StepReport, TokenArrays
from engine.session.folder import SessionFolder, create

BASE = Task(replace(TINY, vocabulary=8192), 16, 16, 48, 2, 1, 16)
GROWN = {
    "batch ×4": replace(BASE, prompts=4 * BASE.prompts),
    "length ×4": replace(BASE, prompt_tokens=64, new_tokens=192),
    "vocabulary ×4": replace(BASE, shape=replace(BASE.shape, vocabulary=4 * 8192)),
}
METRICS = 40
SAMPLES_PER_STEP = 16
WORDS = ["the", "film", "was", "fine", "and", "nobody", "would", "have", "seen", "it", "twice"]


def main() -> None:
    """Runs both measurements and prints their tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--only", choices=("step", "journal"))
    options = parser.parse_args()
    print(machine.describe(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "journal":
            grow_step(Path(folder))
        if options.only != "step":
            grow_journal(Path(folder), options.steps, options.samples)


# -- a step ----------------------------------------------------------------------------------


def grow_step(folder: Path, iterations: int = 3) -> None:
    """Prints time, memory and seconds by phase of each variant, relative to the base."""
    sides = []
    for name, task in {"base": BASE, **GROWN}.items():
        models = folder / name.replace(" ", "-")
        write_models(models, task)
        arguments = [str(models), *settings(task)]
        environment = rank_environment(LaunchConfig(nice=0))
        sides.append(Side(name, "benchmarks.engine_side", arguments, folder / "log", environment))
        sides[-1].wait_ready()
    try:
        for number in range(iterations + 1):
            for side in sides:
                side.iterate(keep=number > 0)
    finally:
        for side in sides:
            side.close()
    print(f"{'a step of':<16}{'s':>8}{'CPU s':>8}{'×':>7}{'GB':>7}{'×':>7}   seconds by phase, ×")
    base = sides[0]
    for side in sides:
        seconds, cpu = _median(side, "seconds"), _median(side, "cpu")
        phases = " ".join(
            f"{name.partition('/')[2]} {_phase(side, name) / _phase(base, name):.1f}"
            for name in side.iterations[0].phases
        )
        gb = side.iterations[-1].peak_gb
        print(f"{side.name:<16}{seconds:>8.2f}{cpu:>8.2f}{cpu / _median(base, 'cpu'):>7.1f}"
              f"{gb:>7.2f}{gb / base.iterations[-1].peak_gb:>7.1f}   {phases}")  # fmt: skip
    print()


def _median(side: Side, field: str) -> float:
    return statistics.median(getattr(i, field) for i in side.iterations)


def _phase(side: Side, name: str) -> float:
    return statistics.median(i.phases[name] for i in side.iterations)


# -- a journal -------------------------------------------------------------------------------


def grow_journal(folder: Path, steps: int, samples: int) -> None:
    """Prints one row per query and one column per size; the last column is the growth for ×10."""
    table: dict[str, list[float]] = {}
    sizes = [steps // 100, steps // 10, steps]
    per_step = max(1, samples // steps)
    for size in sizes:
        session = create(
            folder / "sessions", f"n{size}", config_file.load(starter.FOLDER / "demo.yaml")
        )
        fill(session, size, per_step)
        for name, value in measure_journal(session, size).items():
            table.setdefault(name, []).append(value)
    print(f"{'steps':<40}{''.join(f'{s:>12,}' for s in sizes)}{'×10 costs':>12}")
    print(f"{'samples':<40}{''.join(f'{s * per_step:>12,}' for s in sizes)}")
    for name, values in table.items():
        cells = "".join(f"{v:>12.2f}" for v in values)
        print(f"{name:<40}{cells}{values[-1] / max(values[-2], 1e-9):>11.1f}x")


def fill(session: SessionFolder, steps: int, per_step: int) -> None:
    """Writes steps with the journal's own methods, in small transactions as in a run."""
    random.seed(steps)
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    for db in (journal._db, journal._samples):  # writing the steps is not measured
        db.execute("PRAGMA synchronous = OFF")
    for step in range(1, steps + 1):
        journal.record_step(step_report(step, per_step, arrays=0))
    journal.close()


def step_report(step: int, samples: int, arrays: int = 4) -> StepReport:
    """A random step report as sent by a rank."""
    values = {f"other/metric_{i}": random.random() for i in range(METRICS - 1)}
    return StepReport(
        step=step,
        metrics={"objective/scores": random.random(), **values},
        samples=[sample(i, with_arrays=i < arrays) for i in range(samples)],
        settings={"beta": 0.05},
    )


def sample(index: int, *, with_arrays: bool) -> Sample:
    """A random response of 32 words."""
    text = " ".join(random.choices(WORDS, k=32))
    numbers = [random.random() for _ in range(32)]
    arrays = TokenArrays(
        tokens=text.split(), token_ids=list(range(32)), logprob=numbers, ref_logprob=numbers,
        advantage=numbers, value=numbers,
    )  # fmt: skip
    return Sample(
        index=index, prompt="I saw the", response=text, score=random.random(), kl=random.random(),
        length=32, ended=True, arrays=arrays if with_arrays else None,
    )  # fmt: skip


def measure_journal(session: SessionFolder, steps: int) -> dict[str, float]:
    """Measures the operations of the supervisor, the dashboard and the commands.

    Returns:
        Milliseconds by operation, and the sizes of the files in MB.
    """
    journal = JournalWriter(session)
    new_steps = iter(range(steps + 1, steps + 1000))
    results = {
        "write a step, 16 samples, 4 arrays (ms)": _time(
            lambda: journal.record_step(step_report(next(new_steps), SAMPLES_PER_STEP))
        )
    }
    journal.close()
    results |= _measure_queries(session, steps)
    results["journal.db (MB)"] = session.journal_file.stat().st_size / 1e6
    results["samples.db (MB)"] = session.samples_file.stat().st_size / 1e6
    return results


def _measure_queries(session: SessionFolder, steps: int) -> dict[str, float]:
    def measure(query: Callable[[JournalReader], object], times: int = 7) -> float:
        def once() -> None:
            with JournalReader(session) as reader:
                query(reader)

        return _time(once, times)

    results = {
        "open, state and last step (ms)": measure(lambda r: (r.meta(), r.last_step())),
        "a whole curve (ms)": measure(lambda r: r.metrics.series("objective/scores")),
        "a curve's new points (ms)": measure(
            lambda r: r.metrics.series("objective/scores", steps - 10)
        ),
        "the last 50 steps, all metrics (ms)": measure(lambda r: r.metrics.rows(50)),
    }
    for name, query in {
        "newest page of samples (ms)": SampleQuery(),
        "page of samples by score (ms)": SampleQuery(order="score"),
        "page of samples with a word (ms)": SampleQuery(text="nowhere to be found"),
    }.items():
        results[name] = measure(partial(_page, query), times=3)
    return results


def _page(query: SampleQuery, reader: JournalReader) -> object:
    return reader.samples.page(query, 50)


def _time(function: Callable[[], object], times: int = 7) -> float:
    """The median duration of several calls, in milliseconds."""
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        durations.append(time.perf_counter() - began)
    return 1000 * statistics.median(durations)


if __name__ == "__main__":
    main()
