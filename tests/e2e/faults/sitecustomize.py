"""Makes one rank fail at the beginning of a phase, as $RLHF_TUI_TEST_FAULT says: PHASE|ACT.

Python imports this at the start of every process that has the folder on its path. The rank raises,
is killed, or hangs where it announces the phase of the second step; everything else is the software
as it is.
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
    time.sleep(10_000)


class Saboteur:
    """Gives the `phase` of engine.train.link a fault when that module is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "engine.train.link":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            sabotage(module.Link)

        spec.loader.exec_module = exec_module
        return spec


def sabotage(link):
    announce = link.phase
    phase, act = os.environ["RLHF_TUI_TEST_FAULT"].split("|")

    def phase_with_fault(self, step, name, *progress):
        if name == phase and (step == 2 or name.startswith("load")):
            fail(act)
        return announce(self, step, name, *progress)

    link.phase = phase_with_fault


if os.environ.get("RLHF_TUI_TEST_FAULT") and os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Saboteur())
