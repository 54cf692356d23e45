"""Writes labels, notes and preferences in a thread, in the order they were made.

A slow or busy disk must not block the keys. All changes are written before the process ends, unless
it is killed.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.errors import RlhfError


class LabelWriter:
    """Writes changes one after another, and reports each one."""

    def __init__(self, post: Callable[[str], object]) -> None:
        """`post` is called from another thread with why a change could not be written, or ""."""
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
            self._post(str(error))
        except Exception as error:  # nobody reads the result of the future
            self._post(f"this judgement was not written: {type(error).__name__}: {error}")
        else:
            self._post("")
