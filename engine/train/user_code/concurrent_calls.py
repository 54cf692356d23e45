"""Calls the user's code in threads, each call within a time limit."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from engine.train.user_code.coroutines import stack_of_awaited
from engine.train.user_code.function import forks_ended

LONG_CALL = 60.0
"""Seconds after which a call that has not returned is told."""
CHECK_INTERVAL = 1.0
"""Seconds between checks of the calls that have not returned."""

T = TypeVar("T")


class CallTimeoutError(Exception):
    """A call has not returned within the time limit."""

    def __init__(self, text: str, stack: str) -> None:
        super().__init__(text)
        self.stack = stack
        """Where it was at that time."""


def call_each(
    call: Callable[[int], T],
    count: int,
    *,
    concurrency: int,
    limit: float,
    quoted: Callable[[int], str],
    waits: Callable[[], None],
    takes_long: Callable[[int, float], None],
) -> list[T]:
    """Calls something for each index; returns the results in their order.

    After an error, no further calls are begun, and those in progress are waited for. A call that
    exceeds the limit is not: its thread goes on, since a thread cannot be ended.

    Args:
        call: called with 0 … `count` - 1, in threads.
        count: number of calls.
        concurrency: number of calls at the same time.
        limit: seconds that a call may take.
        quoted: says what a call is called with; for errors.
        waits: called regularly while there are calls, and after each, in the caller's thread.
        takes_long: called with the first call that takes longer than :data:`LONG_CALL`, and its
            seconds.

    Raises: CallTimeoutError: a call exceeds the limit; or the first error of a call, in their
        order.
    """
    begun: dict[int, tuple[float, int]] = {}
    told = False

    def called(i: int) -> T:
        begun[i] = (time.monotonic(), threading.get_ident())
        with forks_ended():
            try:
                return call(i)
            except Exception as error:
                error.add_note(f"called with {quoted(i)}")
                raise
            finally:
                del begun[i]

    def check() -> None:
        nonlocal told
        now = time.monotonic()
        for i, (since, thread) in begun.copy().items():
            if now - since > limit:
                error = CallTimeoutError(
                    f"no return within {limit:g} s, the limit of environment.timeout",
                    _stack_of(thread),
                )
                error.add_note(f"called with {quoted(i)}")
                raise error
            if now - since > LONG_CALL and not told:
                told = True
                takes_long(i, now - since)

    pool = ThreadPoolExecutor(concurrency, "environment")
    futures = [pool.submit(called, i) for i in range(count)]
    results: list[T] = []
    first: BaseException | None = None
    try:
        for future in futures:
            while not wait([future], CHECK_INTERVAL).done:
                check()
                waits()
            if future.cancelled():
                continue
            if (error := future.exception()) is None:
                results.append(future.result())
            else:
                first = error if first is None else first
                for other in futures:
                    other.cancel()
            waits()
    finally:
        pool.shutdown(wait=not begun, cancel_futures=True)
    if first is not None:
        raise first
    return results


def _stack_of(thread: int) -> str:
    """Where a call is, as the lines of a traceback, the innermost last."""
    if awaited := stack_of_awaited(thread):
        return awaited
    if (frame := sys._current_frames().get(thread)) is None:  # it has just returned
        return ""
    stack = traceback.extract_stack(frame)
    first = max((i + 1 for i, at in enumerate(stack) if at.filename == __file__), default=0)
    return "".join(traceback.format_list(stack[first:]))
