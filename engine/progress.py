"""How work of some length tells what it has done."""

from collections.abc import Callable

ReportProgress = Callable[[int, int], None]
"""Called with what is done and with the whole, in a unit of the work's own."""


def report_nothing(_done: int, _total: int) -> None:
    """A :data:`ReportProgress` for work that nobody watches."""
