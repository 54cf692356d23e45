"""How cost grows: batch, length and vocabulary ×4; long sessions; journals of many samples.

    python -m benchmarks.growth [--steps 100000] [--samples 500000] [--only step|journal]

Steps are of a small model, by a rank's own code, base and grown taking turns. Journals are filled
to a hundredth, a tenth and all of the size, and asked the same questions at each.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from benchmarks.engine_side import settings
from benchmarks.side import Side
from benchmarks.task import TINY, Task, write_models
from engine import starter
from engine.config import file as config_file
from engine.config.schema import LaunchConfig
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from engine.launch.environment import rank_environment
from engine.protocol.rank_messages import Sample, StepReport, TokenArrays
from engine.session.folder import Session, create

BASE = Task(replace(TINY, vocabulary=8192), 16, 16, 48, 2, 1, 16)
GROWN = {
    "batch ×4": replace(BASE, prompts=4 * BASE.prompts),
    "length ×4": replace(BASE, prompt_tokens=64, new_tokens=192),
    "vocabulary ×4": replace(BASE, shape=replace(BASE.shape, vocabulary=4 * 8192)),
}
METRICS = 40
SAMPLES_A_STEP = 16
WORDS = ["the", "film", "was", "fine", "and", "nobody", "would", "have", "seen", "it", "twice"]


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=100_000)
    options.add_argument("--samples", type=int, default=500_000)
    options.add_argument("--only", choices=("step", "journal"))
    given = options.parse_args()
    print(machine.describe(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "journal":
            grow_step(Path(folder))
        if given.only != "step":
            grow_journal(Path(folder), given.steps, given.samples)


# -- a step ----------------------------------------------------------------------------------


def grow_step(folder: Path, iterations: int = 3) -> None:
    """One table: seconds of processor time of each phase, and what 4 times as much costs."""
    sides = []
    for name, task in {"base": BASE, **GROWN}.items():
        place = folder / name.replace(" ", "-")
        write_models(place, task)
        arguments = [str(place), *settings(task)]
        own = rank_environment(LaunchConfig(nice=0))
        sides.append(Side(name, "benchmarks.engine_side", arguments, folder / "log", own))
        sides[-1].wait_ready()
    try:
        for turn in range(iterations + 1):
            for side in sides:
                side.iterate(keep=turn > 0)
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
    """A row a question, a column a size; the last column says what 10 times the size costs."""
    table: dict[str, list[float]] = {}
    sizes = [steps // 100, steps // 10, steps]
    per_step = max(1, samples // steps)
    for size in sizes:
        session = create(
            folder / "sessions", f"n{size}", config_file.load(starter.FOLDER / "demo.yaml")
        )
        fill(session, size, per_step)
        for name, value in ask(session, size).items():
            table.setdefault(name, []).append(value)
    print(f"{'steps':<40}{''.join(f'{s:>12,}' for s in sizes)}{'×10 costs':>12}")
    print(f"{'samples':<40}{''.join(f'{s * per_step:>12,}' for s in sizes)}")
    for name, values in table.items():
        cells = "".join(f"{v:>12.2f}" for v in values)
        print(f"{name:<40}{cells}{values[-1] / max(values[-2], 1e-9):>11.1f}x")


def fill(session: Session, steps: int, per_step: int) -> None:
    """By the journal's own methods, a few rows a transaction as a run writes them."""
    random.seed(steps)
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    for db in (journal._db, journal._samples):  # filling is not what is measured
        db.execute("PRAGMA synchronous = OFF")
    for step in range(1, steps + 1):
        journal.record_step(step_report(step, per_step, arrays=0))
    journal.close()


def step_report(step: int, samples: int, arrays: int = 4) -> StepReport:
    """One as a rank sends them."""
    values = {f"other/metric_{i}": random.random() for i in range(METRICS - 1)}
    return StepReport(
        step=step,
        metrics={"objective/scores": random.random(), **values},
        samples=[sample(i, with_arrays=i < arrays) for i in range(samples)],
        settings={"beta": 0.05},
    )


def sample(index: int, *, with_arrays: bool) -> Sample:
    """An answer of 32 words."""
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


def ask(session: Session, steps: int) -> dict[str, float]:
    """Milliseconds of what the supervisor, the dashboard and the commands do; sizes in MB."""
    journal = JournalWriter(session)
    fresh = iter(range(steps + 1, steps + 1000))
    found = {
        "write a step, 16 samples, 4 arrays (ms)": _timed(
            lambda: journal.record_step(step_report(next(fresh), SAMPLES_A_STEP))
        )
    }
    journal.close()
    found |= _questions(session, steps)
    found["journal.db (MB)"] = session.journal_file.stat().st_size / 1e6
    found["samples.db (MB)"] = session.samples_file.stat().st_size / 1e6
    return found


def _questions(session: Session, steps: int) -> dict[str, float]:
    def ask_it(question: Callable[[JournalReader], object], times: int = 7) -> float:
        def once() -> None:
            with JournalReader(session) as record:
                question(record)

        return _timed(once, times)

    found = {
        "open, state and last step (ms)": ask_it(lambda r: (r.meta(), r.last_step())),
        "a whole curve (ms)": ask_it(lambda r: r.series("objective/scores")),
        "a curve's new points (ms)": ask_it(lambda r: r.series("objective/scores", steps - 10)),
        "the last 50 steps, all metrics (ms)": ask_it(lambda r: r.metrics(50)),
    }
    for name, query in {
        "newest page of samples (ms)": SampleQuery(),
        "page of samples by score (ms)": SampleQuery(order="score"),
        "page of samples with a word (ms)": SampleQuery(text="nowhere to be found"),
    }.items():
        found[name] = ask_it(lambda r, q=query: r.samples.page(q, 50), times=3)
    return found


def _timed(work: Callable[[], object], times: int = 7) -> float:
    """The median, in milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


if __name__ == "__main__":
    main()
