"""A long run under random commands, and what it holds: ``python -m tests.faults.soak``.

A real supervisor and a real rank train a tiny model. Every 500 steps the memory, the file
descriptors and the threads of both, and the size of the journal, are printed. At the end `verify`
must find nothing, and the commands in the journal, computed again, must give the learning rate of
every step and the final settings.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from engine.config.settings import settings_of
from engine.journal.reader import JournalReader
from engine.journal.rows import CommandRow
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Note,
    Pause,
    Probe,
    SetBeta,
    SetKLController,
    SetSetting,
    Undo,
    Unpause,
)
from tests.faults.lab import FaultRun, LostError
from tests.faults.light import application_order
from tests.waiting import until

STEPS = 5000
LONG = 3 * 3600.0
"""Seconds that the whole run may take."""
HEADER = (
    f"{'step':>6} {'s/step':>7}  {'supervisor MB':>13} {'files':>5} {'threads':>7} "
    f"{'CPU ms/step':>11}  {'rank MB':>8} {'files':>5} {'threads':>7} {'CPU ms/step':>11}  "
    f"{'journal MB':>10} {'samples MB':>10} {'log kB':>7} {'commands':>8}"
)
OVERRIDES = (
    "train.save_every=50", "kl.controller=adaptive", "kl.target=6", "kl.horizon=500",
    "train.learning_rate=1e-5", "log.samples=4", "log.arrays=1",
)  # fmt: skip


class Usage(NamedTuple):
    """What one process holds."""

    megabytes: float
    """Resident."""
    files: int
    threads: int
    seconds: float
    """Of processor time."""

    @classmethod
    def of(cls, process: psutil.Process) -> "Usage":
        """What a process holds now. Raises psutil.Error if it has ended."""
        with process.oneshot():
            times = process.cpu_times()
            return cls(
                process.memory_info().rss / 1e6, process.num_fds(), process.num_threads(),
                times.user + times.system,
            )  # fmt: skip


def usage_of(run: FaultRun) -> tuple[Usage, Usage]:
    """Of the supervisor and of the rank."""
    engine, ranks = run.engine(), run.ranks()
    if engine is None or not ranks:
        raise LostError(f"the run has ended: {run.log()[-600:]}")
    return Usage.of(engine), Usage.of(ranks[0])


def random_command(rng: random.Random) -> AnyCommand:
    """A command that an operator could send, with values that the run survives."""
    values: dict[str, Any] = {
        "learning_rate": round(rng.uniform(1e-6, 5e-5), 9),
        "target": round(rng.uniform(2, 9), 2),
        "horizon": rng.randint(200, 2000),
        "clip_range": round(rng.uniform(0.1, 0.3), 3),
        "temperature": round(rng.uniform(0.8, 1.2), 2),
        "epochs": rng.randint(1, 2),
        "max_new_tokens": rng.randint(4, 8),
        "save_every": rng.randint(20, 80),
    }
    key = rng.choice(list(values))
    controller = rng.choice(("adaptive", "fixed"))
    return rng.choice(
        [
            SetSetting(key=key, value=values[key]), SetSetting(key=key, value=values[key]),
            SetBeta(value=round(rng.uniform(0.01, 0.5), 3)),
            SetKLController(controller=controller, target=values["target"]),
            Undo(), Undo(), Note(text="a note"), Checkpoint(), Pause(), Unpause(),
            Probe(text="The film was"),
        ]
    )  # fmt: skip


class Soak:
    """The run, the thread that steers it, and what was measured."""

    def __init__(self, root: Path, steps: int, every: int, rng: random.Random) -> None:
        self.run = FaultRun(root, "soak", *OVERRIDES, steps=steps)
        self._steps, self._every, self._rng = steps, every, rng
        self._sent: dict[str, int] = {}

    def measure(self) -> None:
        """Runs to the end; prints a line every so many steps."""
        run = self.run
        run.start()
        run.wait_for_step(1)
        ended = threading.Event()
        steering = threading.Thread(target=self._steer, args=(ended,))
        steering.start()
        print(HEADER)
        try:
            began, before, last = time.monotonic(), usage_of(self.run), 1
            for target in range(self._every, self._steps, self._every):
                until(lambda t=target: run.step() >= t or run.is_over(), f"step {target}", LONG)
                if run.is_over():
                    break
                now, usage, step = time.monotonic(), usage_of(self.run), run.step()
                self._print(step, step - last, now - began, before, usage)
                began, before, last = now, usage, step
            until(run.is_over, "the end of the run", LONG)
        finally:
            ended.set()
            steering.join()

    def _print(
        self,
        step: int,
        steps: int,
        seconds: float,
        before: tuple[Usage, Usage],
        now: tuple[Usage, Usage],
    ) -> None:
        parts = [f"{step:>6} {seconds / steps:>7.3f} "]
        for width, old, new in zip((13, 8), before, now, strict=True):
            cpu = 1000 * (new.seconds - old.seconds) / steps
            parts.append(
                f" {new.megabytes:>{width}.1f} {new.files:>5} {new.threads:>7} {cpu:>11.1f} "
            )
        session = self.run.session
        sizes = [size(session.journal_file) / 1e6, size(session.samples_file) / 1e6]
        parts.append(f" {sizes[0]:>10.2f} {sizes[1]:>10.2f} {size(session.log_file) / 1e3:>7.1f}")
        print("".join(parts), f"{len(self.run.acknowledged.commands):>8}", flush=True)

    def _steer(self, ended: threading.Event) -> None:
        while not ended.wait(self._rng.uniform(0, 1)):
            command = random_command(self._rng)
            status = self.run.send(command)
            if isinstance(command, Pause) and status in ("applied", "accepted"):
                ended.wait(self._rng.uniform(0, 0.5))
                while not ended.is_set() and self.run.send_unpause() not in ("applied", "rejected"):
                    continue
            self._sent[status] = self._sent.get(status, 0) + 1

    def check(self) -> None:
        """Raises LostError if something was lost or the history does not fit."""
        self.run.finish()
        self.run.check()
        with JournalReader(self.run.session) as reader:
            rates = {row.step: row.values["lr"] for row in reader.metrics.rows()}
            live = [c for c in reader.commands() if c.live and c.changes]
            order = application_order(reader)
            final = reader.meta().settings or {}
        replay(msgspec.structs.asdict(settings_of(self.run.session.config())), rates, final,
               sorted(live, key=lambda c: (c.applied_step or 0, order[c.id])))  # fmt: skip
        print(f"sent: {self._sent}; {len(live)} changes of settings replayed, "
              f"{len(rates)} steps compared")  # fmt: skip


def replay(
    values: dict[str, Any],
    rates: dict[int, float | None],
    final: dict[str, Any],
    commands: list[CommandRow],
) -> None:
    """Computes the settings from the commands, in order; raises LostError where they differ."""
    for step in sorted(rates):
        for command in commands:
            if command.applied_step == step:
                values |= {c.key: c.new for c in command.changes}
        if rates[step] != values["learning_rate"]:
            raise LostError(
                f"step {step} had a learning rate of {rates[step]}, not {values['learning_rate']}"
            )
    for command in commands:
        if (command.applied_step or 0) > max(rates):
            values |= {c.key: c.new for c in command.changes}
    for key, value in values.items():  # beta also follows the controller: verify computes that
        if key != "beta" and final[key] != value:
            raise LostError(f"the run ended with {key} = {final[key]}, its history gives {value}")


def size(path: Path) -> int:
    """Bytes of a file, with its write-ahead log; 0 if there is none."""
    total = 0
    for file in (path, path.with_name(f"{path.name}-wal")):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def main() -> int:
    """Runs it; returns 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the session")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=500, help="steps between two lines")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    root.mkdir(exist_ok=True)
    soak = Soak(root, options.steps, options.every, random.Random(options.seed))
    try:
        soak.measure()
        soak.check()
    except LostError as error:
        print(error)
        return 1
    finally:
        soak.run.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
