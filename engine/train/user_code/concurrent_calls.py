"""Calls the user's code in threads, each call within a time limit."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from engine.train.user_code.coroutines import stack_of_awaited
from engine.train.user_code.function import forks_ended

LONG_CALL = 60.0
"""Seconds after which a call that has not returned is reported."""
CHECK_INTERVAL = 1.0
"""Seconds between checks of the calls that have not returned."""

T = TypeVar("T")


class CallTimeoutError(Exception):
    """A call has not returned within the time limit."""

    def __init__(self, text: str, index: int, stack: str) -> None:
        super().__init__(text)
        self.index = index
        """The index of the call."""
        self.stack = stack
        """Where it was at that time."""


class ConcurrentCalls:
    """Calls in threads, each with an index."""

    def __init__(
        self,
        *,
        concurrency: int,
        limit: float,
        quoted: Callable[[int], str],
        takes_long: Callable[[int, float], None],
    ) -> None:
        """Begins no call yet.

        Args:
            concurrency: number of calls at the same time.
            limit: seconds that a call may take.
            quoted: says what the call of an index is called with; for errors.
            takes_long: called with the index of the first call that takes longer than
                :data:`LONG_CALL`, and its seconds.
        """
        self._limit, self._quoted, self._takes_long = limit, quoted, takes_long
        self._begun: dict[int, tuple[float, int]] = {}
        """Thread → the time at which its call began, and the call's index. The next call of an
        index may begin before the thread of the last one has ended it here."""
        self._told = False
        self._pool = ThreadPoolExecutor(concurrency, "environment")

    def submit(self, i: int, call: Callable[[int], T]) -> Future[T]:
        """Calls something with an index once a thread is free."""
        return self._pool.submit(self._called, i, call)

    def _called(self, i: int, call: Callable[[int], T]) -> T:
        thread = threading.get_ident()
        self._begun[thread] = (time.monotonic(), i)
        with forks_ended():
            try:
                return call(i)
            except Exception as error:
                error.add_note(f"called with {self._quoted(i)}")
                raise
            finally:
                del self._begun[thread]

    def check(self) -> None:
        """Call it regularly. Raises CallTimeoutError: a call exceeds the limit."""
        now = time.monotonic()
        for thread, (since, i) in self._begun.copy().items():
            if now - since > self._limit:
                error = CallTimeoutError(
                    f"no return within {self._limit:g} s, the limit of environment.timeout",
                    i, _stack_of(thread),
                )  # fmt: skip
                error.add_note(f"called with {self._quoted(i)}")
                raise error
            if now - since > LONG_CALL and not self._told:
                self._told = True
                self._takes_long(i, now - since)

    def close(self) -> None:
        """Begins no further calls, and waits for no call that has not returned.

        A call that is still in progress goes on, since a thread cannot be ended.
        """
        self._pool.shutdown(wait=not self._begun, cancel_futures=True)


def call_each(
    call: Callable[[int], T],
    count: int,
    *,
    waits: Callable[[], None],
    calls: ConcurrentCalls,
) -> list[T]:
    """Calls something for each index; returns the results in their order.

    After an error, no further calls are begun, and those in progress are waited for. A call that
    exceeds the limit is not.

    Args:
        call: called with 0 … `count` - 1, in threads.
        count: number of calls.
        waits: called regularly while there are calls, and after each, in the caller's thread.
        calls: what calls; it is closed.

    Raises:
        CallTimeoutError: a call exceeds the limit.
        Exception: the first error of a call, in their order.
    """
    futures = [calls.submit(i, call) for i in range(count)]
    results: list[T] = []
    first: BaseException | None = None
    try:
        for future in futures:
            while not wait([future], CHECK_INTERVAL).done:
                calls.check()
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
        calls.close()
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
