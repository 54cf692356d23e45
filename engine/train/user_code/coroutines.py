"""Awaits the user's coroutines, all in one event loop."""

import asyncio
import functools
import inspect
import threading
import traceback
from collections.abc import Awaitable
from typing import Any

from engine.train.user_code.function import forks_ended

_awaited: dict[int, Awaitable[Any]] = {}
"""What threads wait for, by the thread's identifier."""
_starting = threading.Lock()


def result_of(value: Any) -> Any:
    """Returns a value, or what it results in if it is awaitable: waits for that.

    All of a rank run in the same event loop, in a thread of its own: what a client opens in one
    call, such as a connection, it can use in the next.

    Raises:
        Exception: what the coroutine raises.
    """
    if not inspect.isawaitable(value):
        return value
    thread = threading.get_ident()
    _awaited[thread] = value
    try:
        result, error = asyncio.run_coroutine_threadsafe(_outcome(value), _event_loop()).result()
    finally:
        del _awaited[thread]
    if error is not None:
        raise error
    return result


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """The result, or what was raised instead: a SystemExit would end the event loop."""
    with forks_ended():
        try:
            return await awaitable, None
        except (Exception, SystemExit) as error:
            return None, error


def _event_loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started_event_loop()


@functools.cache
def _started_event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="coroutines", daemon=True).start()
    return loop


def stack_of_awaited(thread: int) -> str:
    """Where the coroutine is that a thread waits for, as the lines of a traceback.

    The innermost is the last. Empty if the thread waits for none.
    """
    lines = []
    part: Any = _awaited.get(thread)
    while (frame := getattr(part, "cr_frame", None)) is not None:
        code = frame.f_code
        lines.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))
        part = part.cr_await
    return "".join(traceback.format_list(lines))
