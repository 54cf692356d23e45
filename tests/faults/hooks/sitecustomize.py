"""Faults at named points of the engine's processes, without a line of code in them.

Python imports this module at the start of every process that has the folder on its path.
$RLHF_TUI_TEST_POINT is `MODULE:NAME|WHEN|COUNT|ACT|MARKER`: when the function is called for the
COUNTth time, the process does ACT before or after the call, once: the file MARKER, which it creates
first, keeps a restarted process from doing it again. $RLHF_TUI_TEST_CLOCK names a file with the
seconds that are added to the wall clock, 0 while it is missing.
"""

import importlib.util
import os
import resource
import signal
import sys
import time
from functools import reduce

POINT = os.environ.get("RLHF_TUI_TEST_POINT", "")
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
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "full":
            raise OSError(28, "No space left on device")
        case "memory":
            raise MemoryError("a fault made by a test")


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
    """Import hook: adds the fault when the module of the point is imported."""

    def find_spec(self, name, path=None, target=None):
        place, when, count, action, marker = POINT.split("|")
        module, _, qualified = place.partition(":")
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(loaded):
            load(loaded)
            *outer, last = qualified.split(".")
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
if POINT:
    sys.meta_path.insert(0, PointFinder())
if CLOCK:
    shift_clock()
if LIMIT and "RANK" not in os.environ and "engine.launch.rank" in " ".join(sys.orig_argv):
    limit, _, value = LIMIT.partition("=")
    resource.setrlimit(getattr(resource, limit), (int(value), int(value)))
