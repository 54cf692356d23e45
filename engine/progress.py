"""Callbacks for the progress of long work."""

from collections.abc import Callable
from typing import Protocol

ReportProgress = Callable[[int, int], None]
"""Called with (done, total), in a unit of the work, such as rows or tokens."""


def report_nothing(_done: int, _total: int) -> None:
    """A :data:`ReportProgress` for work that nobody watches."""


BeginPart = Callable[[str], ReportProgress]
"""Called with the name of a part of loading; returns what reports the progress of the part."""


def no_progress(_part: str) -> ReportProgress:
    """Reports progress to nobody."""
    return report_nothing


class Announce(Protocol):
    """Reports that a phase of a run begins; returns what reports the progress of the phase."""

    def __call__(self, step: int, name: str, done: int = 0, total: int = 0, /) -> ReportProgress:
        """Called with a step, the phase's name and, if they are known, (done, total)."""


def announce_nothing(_step: int, _name: str, _done: int = 0, _total: int = 0, /) -> ReportProgress:
    """An :class:`Announce` for a run that nobody watches."""
    return report_nothing
