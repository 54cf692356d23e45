"""Runs a slow function beside the event loop without delaying the end of the process."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Like :func:`asyncio.to_thread`, but the process may end while the function runs.

    The end of an event loop waits for its executor's threads, cancelled or not. The function must
    be harmless if it is cut short, such as one that only reads.

    Raises:
        RuntimeError: no thread can be started.
        Exception: what the function raises.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # to cancel the wait must not cancel this future

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="read").start()
    return await asyncio.wrap_future(future)
