"""Faults at named points of the engine's processes, without a line of code in them.

Python imports this module at the start of every process that has the folder on its path.
$RLHF_TUI_TEST_POINT is `MODULE:NAME|WHEN|COUNT|ACT|MARKER`, or several of these, separated by `;`:
when the function is called for the COUNTth time, the process does ACT before or after the call,
once: the file MARKER, which it creates first, keeps a restarted process from doing it again.
$RLHF_TUI_TEST_CLOCK names a file with the seconds that are added to the wall clock, 0 while it is
missing.
"""

import importlib.util
import json
import os
import resource
import signal
import sys
import time
from functools import reduce

POINTS = [p for p in os.environ.get("RLHF_TUI_TEST_POINT", "").split(";") if p]
CLOCK = os.environ.get("RLHF_TUI_TEST_CLOCK", "")
LIMIT = os.environ.get("RLHF_TUI_TEST_LIMIT", "")
"""`NAME=VALUE` of a resource limit of the ranks, such as RLIMIT_AS=1000000000."""


def act(name, marker):
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    match name:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill rollout engine":
            os.kill(rollout_engine(), signal.SIGKILL)
        case "kill rollout engine 1":
            os.kill(rollout_engine(b"1"), signal.SIGKILL)
        case "kill supervisor":
            with open(f"{sys.argv[1]}/engine.json", encoding="utf-8") as file:  # noqa: PTH123 - as below
                os.kill(json.load(file)["pid"], signal.SIGKILL)
            time.sleep(60)  # the kernel kills this process with it
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "full":
            raise OSError(28, "No space left on device")
        case "memory":
            raise MemoryError("a fault made by a test")


def rollout_engine(number=b"0"):
    """The process of this rank's session that generates, by its number among several."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - as below
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - as below
                    words = file.read().split(b"\0")
            except OSError:
                continue
            named = sys.argv[1].encode() in words
            ours = any(word.endswith(b"rollout/vllm/process/start.py") for word in words)
            if named and ours and words[-2] == number:  # each word ends with a zero byte
                return int(pid)
        time.sleep(0.05)
    raise RuntimeError("there is no rollout engine")


def with_fault(original, when, count, name, marker):
    calls = 0

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            act(name, marker)
        result = original(*args, **options)
        if calls == count and when == "after":
            act(name, marker)
        return result

    return call


class PointFinder:
    """Import hook: adds the faults of one module's points when it is imported."""

    def __init__(self, module, points):
        self.module, self.points = module, points

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(loaded):
            load(loaded)
            for point in self.points:
                place, when, count, action, marker = point.split("|")
                *outer, last = place.partition(":")[2].split(".")
                owner = reduce(getattr, outer, loaded)
                fault = with_fault(getattr(owner, last), when, int(count), action, marker)
                setattr(owner, last, fault)

        spec.loader.exec_module = exec_module
        return spec


def shift_clock():
    real = time.time

    def shifted():
        try:
            with open(CLOCK, encoding="ascii") as file:  # noqa: PTH123 - before anything is loaded
                return real() + float(file.read() or 0)
        except FileNotFoundError:
            return real()

    time.time = shifted


if os.environ.get("RLHF_TUI_TEST_LIGHT") and sys.argv[1:2] == ["engine.train.worker"]:
    sys.argv[1] = "tests.faults.light_rank"
for module in {p.partition(":")[0] for p in POINTS}:
    mine = [p for p in POINTS if p.partition(":")[0] == module]
    sys.meta_path.insert(0, PointFinder(module, mine))
if CLOCK:
    shift_clock()
if LIMIT and "RANK" not in os.environ and "engine.launch.rank" in " ".join(sys.orig_argv):
    limit, _, value = LIMIT.partition("=")
    resource.setrlimit(getattr(resource, limit), (int(value), int(value)))
