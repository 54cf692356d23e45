"""Kills of supervisor, rank, agent and app, at random moments and at named points."""

import contextlib
import os
import pty
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from engine.session.folder import SessionFolder
from tests.e2e.lab import PROGRAM
from tests.faults.lab import WAIT, FaultRun
from tests.faults.points import POINTS, Point
from tests.faults.table import Table
from tests.waiting import until

STEPS_OF_A_LIFE = 12
"""After so many steps an engine that met no fault is killed."""
ENDS = "whole runs through kills, end compared"
SHARE_AT_POINTS = 0.5
"""Of the kills; the others are at random moments."""


def undisturbed_run(root: Path, steps: int, *overrides: str, name: str = "undisturbed") -> FaultRun:
    """The run to which the others are compared; it keeps every checkpoint."""
    run = FaultRun(root, name, "train.keep_last=10000", *overrides, steps=steps)
    run.start()
    run.finish()
    return run


class Kills:
    """Kills one session again and again, and resumes it, until it has reached its end."""

    def __init__(self, root: Path, table: Table, rng: random.Random) -> None:
        self._root, self._table, self._rng = root, table, rng
        self._left: Iterator[Point] = iter(rng.sample(POINTS, len(POINTS)))

    def run(self, name: str, undisturbed: FaultRun, steps: int, until_time: float) -> None:
        """Runs one session of `steps` steps to its end through as many kills as that takes.

        After `until_time` (of time.monotonic) it is not killed any more.
        """
        run = FaultRun(self._root, name, steps=steps)
        try:
            while run.state() != "finished":
                if time.monotonic() > until_time or run.step() >= steps - 2:
                    run.start()
                    run.start_steering()
                    run.wait_for("finished", "failed")
                    run.stop_steering()
                else:
                    self._life(run, undisturbed)
            until(run.is_over, "the end of every process", WAIT)
            self._table.count(ENDS, name, lambda: run.check_end(undisturbed))
        finally:
            run.end()

    def run_with_one(self, name: str, undisturbed: FaultRun, steps: int) -> None:
        """Runs one session of `steps` steps to its end through one kill at a random moment.

        After the kill of a rank the same engine continues, after that of a supervisor another one.
        A run that has ended before the moment counts as one without a kill.
        """
        run = FaultRun(self._root, name, steps=steps)

        def end() -> None:
            run.finish()
            run.stop_steering()
            run.check_end(undisturbed)

        try:
            run.start()
            run.start_steering()
            self._random_moment(run, 0, steps - 2)
            kind, fault = self._kill_something(run)
            run.stop_steering()
            if "supervisor" in kind and not run.kill_engine():
                kind = ""
            if kind:
                self._table.count(kind, fault, lambda: run.check(undisturbed))
            if not run.session.is_live() and run.state() != "finished":
                run.start()
            run.start_steering()
            ended = f"{ENDS}: one kill each" if kind else "whole runs that ended before the kill"
            self._table.count(ended, f"{name}, {kind}", end)
        finally:
            run.end()

    def _life(self, run: FaultRun, undisturbed: FaultRun) -> None:
        """Starts the engine, kills something of it, and checks what is left."""
        at_point = self._rng.random() < SHARE_AT_POINTS
        point = next(self._left, None) if at_point else None
        marker = run.place / f"marker-{time.monotonic_ns()}"
        environment = {} if point is None else {"RLHF_TUI_TEST_POINT": point.text(str(marker))}
        before = run.step()
        run.start(environment)
        run.start_steering()
        if point is not None:
            kind, fault = point.kind, f"{point.when} {point.place}"
            until(
                lambda: marker.exists() or run.is_over() or run.step() > before + STEPS_OF_A_LIFE,
                "the point", WAIT,
            )  # fmt: skip
            if not marker.exists():
                kind, fault = "kill of the supervisor, random", f"(not reached: {fault})"
                kind = kind if run.session.is_live() else ""
        else:
            self._random_moment(run, before, STEPS_OF_A_LIFE)
            kind, fault = self._kill_something(run)
        # A rank is restarted; the supervisor's end is a crash.
        if "rank" in kind or (point is not None and run.session.is_live()):
            with contextlib.suppress(AssertionError):
                run.wait_for_step(before + self._rng.randint(1, STEPS_OF_A_LIFE))
        run.stop_steering()
        killed = run.kill_engine()
        if kind and (killed or "supervisor" not in kind):
            self._table.count(kind, fault, lambda: run.check(undisturbed))

    def _random_moment(self, run: FaultRun, before: int, steps: int) -> None:
        """Waits for a random moment of the start or of the steps."""
        if self._rng.random() < 0.25:
            time.sleep(self._rng.uniform(0, 10))
            return
        run.wait_for_step(before + self._rng.randint(1, steps))
        time.sleep(self._rng.uniform(0, 0.4))

    def _kill_something(self, run: FaultRun) -> tuple[str, str]:
        """Kills a rank or the app, or chooses the supervisor, which the caller kills.

        Returns:
            The class and a description; an empty class if the run, or the rank, had ended.
        """
        victim = self._rng.choice(("supervisor", "supervisor", "rank", "app"))
        if victim == "app":
            kill_app(run.session, self._rng.uniform(0.3, 4))
            victim = "app and supervisor"
        if victim == "rank" and (ranks := run.ranks()):
            try:
                self._rng.choice(ranks).kill()
            except psutil.Error:
                return "", ""
        elif victim == "rank":
            victim = "supervisor"
        if not run.session.is_live():
            return "", ""
        return f"kill of the {victim}, random", f"at step {run.step()}"


def kill_app(session: SessionFolder, seconds: float) -> None:
    """Attaches the dashboard in a terminal of its own, and kills it after some seconds."""
    own, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    app = subprocess.Popen(
        [PROGRAM, "attach", session.name, "--sessions", str(session.folder.parent)],
        stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(other)
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        os.set_blocking(own, False)
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                os.read(own, 65536)
            time.sleep(0.05)
    app.kill()
    app.wait()
    os.close(own)


def kill_agents(root: Path, table: Table, rng: random.Random, count: int) -> None:
    """Kills torchrun's agent and its ranks in a run on two ranks."""
    whole = undisturbed_run(root, 60, "launch.processes=2", name="undisturbed-two-ranks")
    run = FaultRun(root, "two-ranks", "launch.processes=2", steps=60)
    try:
        run.start()
        for number in range(count):
            run.wait_for_step(run.step() + rng.randint(1, 6))
            time.sleep(rng.uniform(0, 0.4))
            victim, found = ("agent", run.agents()) if number % 2 else ("rank of two", run.ranks())
            if not found or run.is_over():
                break
            with contextlib.suppress(psutil.Error):
                rng.choice(found).kill()
            before = run.step()
            run.wait_for_step(before + 1)
            table.count(f"kill of the {victim}, random", f"at step {before}", run.check)
        run.finish()
        table.count("whole runs through kills, end compared", "two ranks", lambda: run.check(whole))
    finally:
        run.end()
