"""Makes a process end with its parent, and lets SIGTERM end its children. Standard library only."""

import ctypes
import os
import signal

PARENT_VARIABLE = "RLHF_TUI_PARENT"
"""The environment variable with the id of the parent process that this process ends with."""

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies; ignores all signals to stop.

    A scheduler or Ctrl+C signals all processes at once. Only the supervisor reacts: it lets the
    ranks finish and save the current step.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the line above.
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        os.kill(os.getpid(), signal.SIGKILL)


def let_children_be_terminated() -> None:
    """Lets SIGTERM end the children of a process that ignores it.

    An ignored signal is also ignored by the processes that it forks and the programs they execute.
    `terminate()` of a pool or a process then does nothing, and whoever joins it waits forever.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        return
    # Unlike SIG_IGN, the kernel takes a handler away from a program that is executed.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.siginterrupt(signal.SIGTERM, False)
    # A signal to a child that still has the handler would be lost: it waits until it has not.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        after_in_parent=_unblock,
        after_in_child=_end_by_signal,
    )


def _end_by_signal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
