"""Makes rank 1 fail at the start of a phase; $RLHF_TUI_TEST_FAULT is PHASE|ACT.

Python imports this module at the start of every process that has the folder on its path. The rank
raises, is killed, runs out of memory once (`memory:FILE`, which then exists), or hangs when it
reports the phase in the second step. No other code is changed.
"""

import importlib.util
import os
import signal
import sys
import time


def fail(act):
    if act == "raise":
        raise ValueError("a fault made by a test")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act.startswith("memory:"):
        try:
            os.close(os.open(act.removeprefix("memory:"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # once
            return
        import torch  # noqa: PLC0415 - loaded by now

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    time.sleep(10_000)


class FaultFinder:
    """Import hook: adds the fault to `Link.phase` when engine.train.link is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "engine.train.link":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            add_fault(module.Link)

        spec.loader.exec_module = exec_module
        return spec


def add_fault(link):
    original = link.phase
    phase, act = os.environ["RLHF_TUI_TEST_FAULT"].split("|")

    def phase_with_fault(self, step, name, *progress):
        if name == phase and (step == 2 or name.startswith("load")):
            fail(act)
        return original(self, step, name, *progress)

    link.phase = phase_with_fault


if os.environ.get("RLHF_TUI_TEST_FAULT") and os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, FaultFinder())
