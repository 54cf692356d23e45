"""Does a run with 50 viewers take longer? ``python -m tests.faults.viewers`` (8 minutes).

Turns with and without viewers alternate, around two runs: one with steps as short as they get, one
with steps of half a second. Viewers attach and detach at random moments. Kinds of turns:

- *none*: nobody watches;
- *clients*: 50 connections that watch, as the dashboard has, but read no journal and draw nothing:
  what viewers cost the engine;
- *viewers*: 50 followers of the dashboard, each with its connection and its reads of the journal,
  and 3 whole dashboards in terminals of their own: what viewers cost the machine as well.

The rank has a core of its own, as where there are cores to spare, and everything else shares the
others. The last turns are without that. Wall time is that between the rows of the steps.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.protocol.client import Client
from engine.protocol.commands import Stop
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.feed import Feed
from tests.faults.kills import kill_app
from tests.faults.lab import FaultRun, LostError
from tests.faults.soak import usage_of

SHORTEST, LONGEST = 1.0, 15.0
"""Seconds that a viewer stays."""
METRICS = ("objective/scores", "objective/kl", "objective/kl_coef", "policy/clipfrac_avg")
WARM_UP = 3.0
"""Seconds in which the viewers of a turn start, before it is measured."""
NONE, CLIENTS, VIEWERS = "none", "clients", "viewers"
EVEN = ("train.learning_rate=1e-12", "train.save_every=1000000", "log.samples=4")
"""Keeps the policy, and with it the length of responses, so that all steps take equally long."""
LONG = (
    "rollout.batch_size=64", "rollout.max_new_tokens=48", "ppo.epochs=4", "ppo.minibatches=4",
    "ppo.micro_batch_size=16",
)  # fmt: skip
"""Overrides for steps of half a second."""


class Turn(NamedTuple):
    """One turn: seconds per step, of wall and of processor time."""

    wall: float
    supervisor: float
    rank: float
    viewers: float
    """Seconds of processor time of the viewers per second."""
    watchers: float
    """Connections that watch, mean."""

    def text(self) -> str:
        """In one line."""
        return (
            f"wall {self.wall:.4f} rank {self.rank:.4f} supervisor {self.supervisor:.4f} "
            f"viewers {self.viewers:.2f} watchers {self.watchers:.0f}"
        )


class Scenario(NamedTuple):
    """Turns around one run."""

    steps: str
    """Of the run, short or long."""
    own_core: bool
    """Whether the rank has a core of its own."""
    kinds: tuple[str, ...]
    weight: float
    """Share of the time."""

    @property
    def title(self) -> str:
        """For the table."""
        where = "the rank on a core of its own" if self.own_core else "all share the cores"
        return f"{self.steps} steps, {where}"


SCENARIOS = (
    Scenario("short", own_core=True, kinds=(NONE, CLIENTS, VIEWERS), weight=3),
    Scenario("long", own_core=True, kinds=(NONE, CLIENTS, VIEWERS), weight=4),
    Scenario("long", own_core=False, kinds=(NONE, VIEWERS), weight=3),
)


# -- the viewers, in a process of their own --------------------------------------------------------


def watch(session: SessionFolder, number: int, seconds: float) -> None:
    """Watches for some seconds, and reads nothing but the engine's messages."""
    until = time.monotonic() + seconds
    with contextlib.suppress(RlhfError, OSError), Client(session, f"client {number}") as client:
        client.status()
        for _ in client.watch():
            if time.monotonic() > until:
                return


def follow(session: SessionFolder, number: int, seconds: float) -> None:
    """Follows the session as the dashboard does."""
    feed = Feed(session, f"viewer {number}", METRICS, lambda _update: None)
    feed.start()
    time.sleep(seconds)
    feed.stop()


def look_on(session: SessionFolder, kind: str, count: int, apps: int, seconds: float) -> None:
    """Viewers attach and detach for some time; prints their processor time as JSON."""
    deadline = time.monotonic() + seconds
    view = watch if kind == CLIENTS else follow

    def again(number: int) -> None:
        rng = random.Random(number)
        while (left := deadline - time.monotonic()) > 0:
            view(session, number, min(left, rng.uniform(SHORTEST, LONGEST)))

    def attach(number: int) -> None:
        rng = random.Random(-1 - number)
        while (left := deadline - time.monotonic()) > 0:
            kill_app(session, min(left, rng.uniform(5, 20)))

    threads = [threading.Thread(target=again, args=(number,)) for number in range(count)]
    if kind == VIEWERS:
        threads += [threading.Thread(target=attach, args=(number,)) for number in range(apps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(sum(one.ru_utime + one.ru_stime for one in used)))


# -- the runs --------------------------------------------------------------------------------------


class Watched:
    """A run, and turns with and without viewers."""

    def __init__(self, root: Path, steps: str, count: int, apps: int) -> None:
        overrides = LONG if steps == "long" else ()
        self.run = FaultRun(root, f"watched-{steps}", *EVEN, *overrides, steps=10_000_000)
        self._count, self._apps = count, apps

    def turn(self, kind: str, seconds: float, *, own_core: bool) -> Turn:
        """Runs for some seconds, and measures."""
        cores = sorted(os.sched_getaffinity(0))
        rank, others = (cores[:1], cores[1:] or cores) if own_core else (cores, cores)
        viewers = None if kind == NONE else self._start_viewers(kind, seconds)
        try:
            self._place(rank, others, viewers)
            time.sleep(WARM_UP)
            began, before = time.time(), usage_of(self.run)
            watchers = []
            while (left := began + seconds - time.time()) > 0:
                time.sleep(min(left, 2.0))
                watchers.append(self.run.watchers())
            ended, after = time.time(), usage_of(self.run)
        finally:
            used = 0.0
            if viewers is not None:
                out, _ = viewers.communicate()
                used = float(json.loads(out)) / (seconds + WARM_UP)
        wall = self._seconds_per_step(began, ended)
        shares = (
            (b.seconds - a.seconds) / (ended - began) for a, b in zip(before, after, strict=True)
        )
        supervisor, trained = (share * wall for share in shares)
        return Turn(wall, supervisor, trained, used, statistics.mean(watchers))

    def _start_viewers(self, kind: str, seconds: float) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "tests.faults.viewers", "--view", kind]
        words += ["--session", str(self.run.session.folder), "--viewers", str(self._count)]
        words += ["--apps", str(self._apps), "--seconds", str(seconds + WARM_UP)]
        return subprocess.Popen(words, stdout=subprocess.PIPE)

    def _place(
        self, rank: list[int], others: list[int], viewers: subprocess.Popen[bytes] | None
    ) -> None:
        """Gives the rank's threads some cores, and others to the supervisor and the viewers."""
        engine, ranks = self.run.engine(), self.run.ranks()
        pids = [engine.pid] if engine is not None else []
        pids += [viewers.pid] if viewers is not None else []
        for pid, cores in [*((r.pid, rank) for r in ranks), *((pid, others) for pid in pids)]:
            for thread in psutil.Process(pid).threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)

    def _seconds_per_step(self, began: float, ended: float) -> float:
        with JournalReader(self.run.session) as reader:
            rows = reader.metrics.rows(last=2000)
        times = [row.time for row in rows if began <= row.time <= ended]
        if len(times) < 2:
            raise LostError(f"{len(times)} steps in {ended - began:.0f} s")
        return (times[-1] - times[0]) / (len(times) - 1)

    def end(self) -> None:
        """Stops the run and checks its session."""
        self.run.send(Stop())
        with contextlib.suppress(LostError):  # it is stopped, not finished
            self.run.finish()
        self.run.check()


# -- the table -------------------------------------------------------------------------------------


def report(scenario: Scenario, turns: dict[str, list[Turn]]) -> None:
    """Prints means with standard errors over the turns, and the differences to those without."""
    columns = [NONE, *(f"{kind}{more}" for kind in scenario.kinds[1:] for more in ("", " − none"))]
    print(f"\n{scenario.title}; {len(turns[NONE])} turns of each kind, ms per step")
    print(f"{'':<16}", *(f"{column:>18}" for column in columns))
    for title, name in (("wall time", "wall"), ("rank", "rank"), ("supervisor", "supervisor")):
        values = {k: [1000 * getattr(turn, name) for turn in found] for k, found in turns.items()}
        cells = [with_error(values[NONE])]
        for kind in scenario.kinds[1:]:
            pairs = zip(values[kind], values[NONE], strict=True)
            cells += [with_error(values[kind]), with_error([a - b for a, b in pairs])]
        print(f"{title:<16}", *(f"{cell:>18}" for cell in cells))
    for kind in scenario.kinds[1:]:
        watching = statistics.mean(turn.watchers for turn in turns[kind])
        used = statistics.mean(turn.viewers for turn in turns[kind])
        print(f"{kind}: {watching:.0f} watched on average, and took {used:.2f} cores themselves")


def with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def measure(runs: dict[str, Watched], scenario: Scenario, seconds: float, rounds: int) -> None:
    """Makes the turns of a scenario, in an order in which a drift cancels out."""
    turns: dict[str, list[Turn]] = {kind: [] for kind in scenario.kinds}
    for number in range(rounds):
        for kind in scenario.kinds if number % 2 == 0 else scenario.kinds[::-1]:
            turn = runs[scenario.steps].turn(kind, seconds, own_core=scenario.own_core)
            turns[kind].append(turn)
            print(f"{time.strftime('%X')} {scenario.title}: {kind:<8} {turn.text()}", flush=True)
    report(scenario, turns)


def main() -> None:
    """Runs the turns and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--apps", type=int, default=3, help="whole dashboards beside them")
    parser.add_argument("--minutes", type=float, default=5.5, help="of all turns together")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each kind")
    parser.add_argument("--view", choices=[CLIENTS, VIEWERS], help=argparse.SUPPRESS)
    parser.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.view is not None:
        session = SessionFolder(options.session)
        look_on(session, options.view, options.viewers, options.apps, options.seconds)
        return
    with tempfile.TemporaryDirectory(prefix="viewers-") as folder:
        take_turns(Path(folder), options)


def take_turns(root: Path, options: argparse.Namespace) -> None:
    """Runs the turns in a folder."""
    whole = sum(scenario.weight for scenario in SCENARIOS)
    runs: dict[str, Watched] = {}
    try:
        for scenario in SCENARIOS:
            if scenario.steps not in runs:
                for earlier in runs.values():
                    earlier.end()
                runs[scenario.steps] = Watched(root, scenario.steps, options.viewers, options.apps)
                runs[scenario.steps].run.start()
                runs[scenario.steps].run.wait_for_step(3)
            turns = options.rounds * len(scenario.kinds)
            share = 60 * options.minutes * scenario.weight / whole
            measure(runs, scenario, max(share / turns - WARM_UP, 5.0), options.rounds)
        runs[SCENARIOS[-1].steps].end()
    finally:
        for watched in runs.values():
            watched.run.end()


if __name__ == "__main__":
    main()
