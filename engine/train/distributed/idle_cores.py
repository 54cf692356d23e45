"""Makes OpenMP's threads wait actively, but only while each of them has an idle core.

A parallel region ends when its slowest thread does, and the next one begins some microseconds
later. A thread that spins meanwhile continues at once. One that sleeps has to be woken up, which
takes some microseconds on a machine and 0.1 ms in some virtual ones: a step of a 135 M model took
12 to 20 % longer there. But threads that spin beside a busy process keep the thread that they wait
for from running: a step then took 129 s instead of 28 s.

libgomp reads `GOMP_SPINCOUNT` once. But its threads never spin while a process has more of them
than cores (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html), so a second team of
threads, which does nothing, makes all of them sleep at once. What is computed, and in which order,
stays the same.
"""

import atexit
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.launch.environment import LONG_WAITING, OPENMP_WAITING, needs_most_cores

CHECK_INTERVAL = 1.0
"""Seconds between two looks at what other processes do."""
IDLE_CHECKS = 2
"""Checks without them after which threads spin. They stop after the first one with some."""
MAX_OTHER_CORES = 0.25
"""Cores that other processes may use: a dashboard that is watched takes a tenth of one."""
STATISTICS = Path("/proc/stat")
EXIT_TIMEOUT = 5.0
"""Seconds that the process waits for the thread at its end."""
TEAM_SIZE = threading.RLock()
"""Held while the number of threads of a new team is another than usual, and to make one."""
PARALLEL_ELEMENTS = 1 << 17
"""Elements of a tensor that torch divides among its threads."""


def adapt_thread_waits() -> bool:
    """Starts a thread that makes waiting threads spin or sleep, as other processes use the cores.

    Does nothing unless the process was started with :data:`~engine.launch.environment.LONG_WAITING`
    and computes with most of the cores. Call it once the number of threads is set.

    Returns:
        Whether it has started the thread.
    """
    if os.environ.get("GOMP_SPINCOUNT") != LONG_WAITING["GOMP_SPINCOUNT"]:
        return False
    os.environ.update(OPENMP_WAITING)  # for the programs that this process starts
    threads = torch.get_num_threads()
    if not needs_most_cores(threads):
        return False
    ended = threading.Event()
    thread = threading.Thread(target=_adapt, args=(threads, ended), name="idle cores", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(EXIT_TIMEOUT)

    # Python would abort at exit if a daemon thread were in torch's code.
    atexit.register(end)
    return True


@dataclass(frozen=True)
class CoreTimes:
    """Processor time up to a moment, in seconds."""

    busy: float
    """Of all processes on the cores of this one, and of other virtual machines (stolen time)."""
    own: float
    at: float

    @classmethod
    def read(cls) -> "CoreTimes":
        """Returns the times up to now."""
        busy = busy_seconds(STATISTICS.read_text(encoding="ascii"), os.sched_getaffinity(0))
        return cls(busy, time.process_time(), time.monotonic())

    def used_by_others(self, before: "CoreTimes") -> float:
        """How many cores other processes have kept busy since an earlier moment."""
        return (self.busy - before.busy - (self.own - before.own)) / (self.at - before.at)


def busy_seconds(statistics: str, cores: set[int]) -> float:
    """The time that was not idle in the text of /proc/stat, on the given cores."""
    ticks = 0
    for line in statistics.splitlines():
        name, *columns = line.split()
        if name.removeprefix("cpu").isdigit() and int(name.removeprefix("cpu")) in cores:
            user, nice, system, _idle, _waiting, *interrupts = map(int, columns[:8])
            ticks += user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK")


class SecondTeam:
    """A second team of OpenMP threads, which sleeps. While it exists, no waiting thread spins."""

    def __init__(self) -> None:
        """Returns when the team exists."""
        self._end, started = threading.Event(), threading.Event()
        self._leader = threading.Thread(
            target=self._lead, args=(started,), name="second team", daemon=True
        )
        with TEAM_SIZE:
            self._leader.start()
            started.wait()

    def _lead(self, started: threading.Event) -> None:
        try:
            # libgomp makes a team for each thread that needs one.
            torch.zeros(PARALLEL_ELEMENTS).add_(1.0)
        finally:
            started.set()
        self._end.wait()

    def end(self) -> None:
        """Ends the team together with the thread to which it belongs."""
        self._end.set()
        self._leader.join()


def _adapt(threads: int, ended: threading.Event) -> None:
    cores = len(os.sched_getaffinity(0))
    team: SecondTeam | None = SecondTeam()
    idle, before = 0, CoreTimes.read()
    while not ended.wait(CHECK_INTERVAL):
        try:
            now = CoreTimes.read()
        except OSError:  # no free descriptors
            idle = 0
        else:
            others = now.used_by_others(before)
            # Some sandboxes show no times: then the own ones seem to be more than those of all.
            free = -MAX_OTHER_CORES <= others <= cores - threads + MAX_OTHER_CORES
            idle = idle + 1 if free else 0
            before = now
        if idle >= IDLE_CHECKS and team is not None:
            team.end()
            team = None
        elif idle == 0 and team is None:
            team = SecondTeam()
    if team is not None:
        team.end()
