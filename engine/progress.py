"""Callbacks for the progress of long work."""

from collections.abc import Callable

ReportProgress = Callable[[int, int], None]
"""Called with (done, total), in a unit of the work, such as rows or tokens."""


def report_nothing(_done: int, _total: int) -> None:
    """A :data:`ReportProgress` for work that nobody watches."""
