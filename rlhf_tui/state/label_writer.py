"""Writes labels, notes and preferences in a thread, in the order they were made.

A slow or busy disk must not block the keys. All changes are written before the process ends, unless
it is killed.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from textual.message import Message

from engine.errors import RlhfError


class LabelWritten(Message):
    """A label, note or preference was written; `problem`: why not."""

    def __init__(self, problem: str = "") -> None:
        super().__init__()
        self.problem = problem


class LabelWriter:
    """Writes changes one after another, and reports each one."""

    def __init__(self, post: Callable[[LabelWritten], object]) -> None:
        """`post` is called from another thread after each change."""
        self._post = post

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="judgements")

    def write(self, change: Callable[[], None]) -> None:
        """Queues a change; returns at once."""
        self._thread.submit(self._write, change)

    def _write(self, change: Callable[[], None]) -> None:
        try:
            change()
        except (RlhfError, OSError) as error:
            self._post(LabelWritten(str(error)))
        except Exception as error:  # nobody reads the result of the future
            problem = f"this judgement was not written: {type(error).__name__}: {error}"
            self._post(LabelWritten(problem))
        else:
            self._post(LabelWritten())
