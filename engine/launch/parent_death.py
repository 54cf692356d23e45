"""Ends a process with its parent. Imports the standard library only."""

import ctypes
import os
import signal

PARENT_VARIABLE = "RLHF_TUI_PARENT"
"""The process id of the parent with which a process ends."""

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
