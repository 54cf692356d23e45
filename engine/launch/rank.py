"""Starts a rank or torchrun's agent: ``python -m engine.launch.rank MODULE ARGUMENT...``.

Importing torch takes seconds. This module imports none of it and first has the kernel end the
process with its parent, so that a rank does not outlive a supervisor that is killed meanwhile.
"""

import ctypes
import gc
import importlib
import os
import signal
import sys

from engine.launch.environment import PARENT_VARIABLE

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies; ignores all signals to stop.

    A scheduler or Ctrl+C signals all processes at once. Only the supervisor reacts: it lets the
    ranks finish and save the current step.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the line above.
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Imports the module that the first argument names and calls its `main`."""
    die_with_parent()
    del sys.argv[0]
    # An import makes hundreds of thousands of objects and no garbage: the collector would look at
    # them again and again, during the import (a twentieth of its time) and in the whole run.
    gc.disable()
    module = importlib.import_module(sys.argv[0])
    gc.freeze()
    gc.enable()
    module.main()


if __name__ == "__main__":
    main()
