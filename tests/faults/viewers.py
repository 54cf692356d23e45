"""Does a run with many viewers take longer? ``python -m tests.faults.viewers``

Turns without and with viewers alternate. The viewers are followers of the dashboard, each with its
connection and its reads of the journal, which attach and detach at random moments, and some whole
dashboards in terminals of their own. Wall time says little where other programs run: compare the
processor time of supervisor and rank per step.
"""

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from engine.protocol.commands import Stop
from engine.session.folder import Session
from rlhf_tui.state.feeds.feed import Feed
from tests.faults.kills import kill_app
from tests.faults.lab import FaultRun, LostError
from tests.faults.soak import Usage

SHORTEST, LONGEST = 1.0, 15.0
"""Seconds that a viewer stays."""
METRICS = ("objective/scores", "objective/kl", "objective/kl_coef", "policy/clipfrac_avg")


class Turn(NamedTuple):
    """One turn: seconds per step."""

    wall: float
    supervisor: float
    """Of processor time."""
    rank: float
    watchers: float
    """Connections that watch, mean."""


def look_on(session: Session, count: int, apps: int, seconds: float) -> None:
    """That many viewers and dashboards attach and detach for some time. Dashboards are killed."""
    deadline = time.monotonic() + seconds

    def view(number: int) -> None:
        rng = random.Random(number)
        while (left := deadline - time.monotonic()) > 0:
            feed = Feed(session, f"viewer {number}", METRICS, lambda _update: None)
            feed.start()
            time.sleep(min(left, rng.uniform(SHORTEST, LONGEST)))
            feed.stop()

    def attach(number: int) -> None:
        rng = random.Random(-1 - number)
        while (left := deadline - time.monotonic()) > 0:
            kill_app(session, min(left, rng.uniform(5, 20)))

    threads = [threading.Thread(target=view, args=(number,)) for number in range(count)]
    threads += [threading.Thread(target=attach, args=(number,)) for number in range(apps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Viewers:
    """A run, and turns with and without viewers."""

    def __init__(self, root: Path, count: int, apps: int, niceness: int) -> None:
        self.run = FaultRun(
            root, "watched", "train.save_every=1000000", "log.samples=4", steps=10_000_000
        )
        self._count, self._apps, self._niceness = count, apps, niceness

    def turn(self, seconds: float, *, watched: bool) -> Turn:
        """Runs for some seconds, and measures."""
        viewers = None
        if watched:
            words = ["nice", "-n", str(self._niceness), sys.executable]
            words += ["-m", "tests.faults.viewers"]
            words += ["--view", str(self.run.session.folder), "--viewers", str(self._count)]
            words += ["--apps", str(self._apps), "--seconds", str(seconds)]
            viewers = subprocess.Popen(words)
        began, before, first = time.monotonic(), self._usage(), self.run.step()
        watchers = []
        while time.monotonic() < began + seconds:
            time.sleep(5)
            watchers.append(self.run.watchers())
        now, after, last = time.monotonic(), self._usage(), self.run.step()
        if viewers is not None:
            viewers.wait()
        steps = last - first
        supervisor, rank = (
            (new.seconds - old.seconds) / steps for old, new in zip(before, after, strict=True)
        )
        return Turn((now - began) / steps, supervisor, rank, statistics.mean(watchers))

    def _usage(self) -> tuple[Usage, Usage]:
        engine, ranks = self.run.engine(), self.run.ranks()
        if engine is None or not ranks:
            raise LostError(f"the run has ended: {self.run.log()[-600:]}")
        return Usage.of(engine), Usage.of(ranks[0])


def report(without: list[Turn], watched: list[Turn]) -> None:
    """Prints means with standard errors over the turns, and the differences of pairs."""
    print(f"{len(without)} pairs of turns; watching on average: "
          f"{statistics.mean(t.watchers for t in watched):.0f}")  # fmt: skip
    print(f"{'ms per step':<28} {'without':>16} {'with viewers':>16} {'difference of pairs':>20}")
    for words, name in (
        ("wall time", "wall"),
        ("processor time of the rank", "rank"),
        ("of the supervisor", "supervisor"),
    ):
        a, b = ([1000 * getattr(t, name) for t in turns] for turns in (without, watched))
        differences = [y - x for x, y in zip(a, b, strict=True)]
        print(f"{words:<28} {with_error(a):>16} {with_error(b):>16} {with_error(differences):>20}")


def with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    """Runs the turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--apps", type=int, default=3, help="whole dashboards beside them")
    parser.add_argument("--nice", type=int, default=0, help="added to the niceness of viewers")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=10, help="with viewers, and as many without")
    parser.add_argument("--view", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.view is not None:
        look_on(Session(options.view), options.viewers, options.apps, options.seconds)
        return
    root = Path(tempfile.mkdtemp(prefix="viewers-"))
    watched = Viewers(root, options.viewers, options.apps, options.nice)
    turns: dict[bool, list[Turn]] = {False: [], True: []}
    try:
        watched.run.start()
        watched.run.wait_for_step(20)
        for number in range(2 * options.turns):
            on = number % 4 in (1, 2)  # without, with, with, without: a drift cancels out
            turns[on].append(watched.turn(options.seconds, watched=on))
            print("with   " if on else "without", turns[on][-1], flush=True)
        report(turns[False], turns[True])
        watched.run.send(Stop())
        with contextlib.suppress(LostError):  # it is stopped, not finished
            watched.run.finish()
        watched.run.check()
    finally:
        watched.run.end()


if __name__ == "__main__":
    main()
