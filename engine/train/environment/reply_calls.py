"""Calls of environments in threads, of which the first error ends all."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

from engine.train.user_code.concurrent_calls import (
    CHECK_INTERVAL,
    CallTimeoutError,
    ConcurrentCalls,
)


class ReplyCalls:
    """Calls for rows of a batch."""

    def __init__(self, calls: ConcurrentCalls, failed: Callable[[], None]) -> None:
        """Begins no call yet; `failed` is called after the first error."""
        self._calls, self._failed = calls, failed
        self._lock = threading.Lock()
        self._futures: set[Future[None]] = set()
        self._overdue = False
        """Whether a call has exceeded the limit, so that calls are no longer waited for."""
        self.error: BaseException | None = None
        """The first one."""
        self.failed_row = 0

    @property
    def any_left(self) -> bool:
        """Whether there are calls that have not returned."""
        return bool(self._futures)

    def submit(self, row: int, call: Callable[[int], None]) -> None:
        """Calls something with a row once a thread is free, unless there has been an error."""
        if self.error is None:
            future = self._calls.submit(row, call)
            self._futures.add(future)
            future.add_done_callback(partial(self._done, row))

    def check(self) -> None:
        """Call it regularly. A call that exceeds the limit is an error."""
        try:
            self._calls.check()
        except CallTimeoutError as error:
            self._overdue = True
            self._fail(error.index, error)  # unless another call has raised before

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Waits for all calls, unless one exceeds the limit; `meanwhile` calls :meth:`check`."""
        while (futures := self._futures.copy()) and not self._overdue:
            wait(futures, CHECK_INTERVAL)
            meanwhile()

    def close(self) -> None:
        """Begins no further calls. Does not wait for those that have not returned."""
        self._calls.close()

    def _done(self, row: int, future: Future[None]) -> None:
        """Called when a call has returned, or will not begin."""
        if not future.cancelled() and (error := future.exception()) is not None:
            self._fail(row, error)
        self._futures.discard(future)

    def _fail(self, row: int, error: BaseException) -> None:
        with self._lock:
            if self.error is None:
                self.error, self.failed_row = error, row
        self._failed()
        for future in self._futures.copy():
            future.cancel()
