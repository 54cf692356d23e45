"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import Any

import psutil

LONG = 240.0
"""Timeout in seconds for conditions; long enough for a busy machine."""


def until(condition: Callable[[], Any], what: str = "such state", seconds: float = LONG) -> Any:
    """Waits for a condition and returns its value; `what` describes it in the failure message."""
    deadline = time.monotonic() + seconds
    interval = 0.01
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(interval)
        # Conditions read a journal or all processes: often asked, they take time from the run.
        interval = min(0.1, 1.2 * interval)
    raise AssertionError(f"within {seconds:g} s: no {what}")


def is_running(pid: int) -> bool:
    """Whether a process has not ended. One whose parent has not waited for it has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
