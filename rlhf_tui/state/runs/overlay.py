"""Reads other runs' curves and aligns them with the open run, to overlay them."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

from msgspec import Struct

from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.metrics import EPISODE, STEP_TIME
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.first_read import SPANS
from rlhf_tui.state.series import Series

ALIGNMENTS = ("step", "episode", "hours")
"""What the curves of several runs are aligned by: the step, the number of responses so far, or the
hours of training, without pauses."""
CLOCKS = {"episode": (EPISODE, False), "hours": (STEP_TIME, True)}
"""Alignment → the metric that is its clock, and whether that is summed over the steps."""


class RunClock:
    """The cumulated responses, or seconds of training, at each step of a run."""

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        """`points`: step and cumulated value, both increasing. 0 at step 0."""
        later = [(step, passed) for step, passed in points if step > 0 and passed > 0]
        self._steps = [0, *(step for step, _ in later)]
        self._passed = [0.0, *(passed for _, passed in later)]

    def __bool__(self) -> bool:
        """Whether there are any points."""
        return len(self._steps) > 1

    def at(self, step: float) -> float:
        """The cumulated value at a step; extrapolated at the mean pace after the last one."""
        return _interpolated(self._steps, self._passed, step)

    def step_at(self, passed: float) -> float:
        """The step at which a value was reached; extrapolated like :meth:`at`."""
        return _interpolated(self._passed, self._steps, passed)


def _interpolated(xs: list[float] | list[int], ys: list[float] | list[int], x: float) -> float:
    """The value on the lines between the points, both increasing; (0, 0) is the first."""
    if x >= xs[-1]:
        return x * ys[-1] / xs[-1] if xs[-1] else x
    i = bisect_right(xs, x)
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


class Overlay(Struct, frozen=True):
    """Another run."""

    name: str
    curves: dict[str, Series] = {}
    """Downsampled curves by metric, by its own steps."""
    clocks: dict[str, RunClock] = {}
    problem: str = ""
    """Why it cannot be read."""


def read_overlay(session: SessionFolder, names: Iterable[str]) -> Overlay:
    """Reads the downsampled curves and the clocks of a run. Call it in a thread."""
    try:
        with JournalReader(session) as reader:
            downsampled = reader.metrics.downsampled(names, SPANS)
            clocks = _clocks(reader)
    except (RlhfError, OSError) as error:
        return Overlay(session.name, problem=str(error))
    return Overlay(session.name, {n: Series(points) for n, points in downsampled.items()}, clocks)


def read_clocks(session: SessionFolder) -> dict[str, RunClock]:
    """Reads the clocks of the open run. Raises JournalError."""
    with JournalReader(session) as reader:
        return _clocks(reader)


def _clocks(reader: JournalReader) -> dict[str, RunClock]:
    return {
        alignment: RunClock(reader.metrics.cumulated(metric, SPANS, summed=summed))
        for alignment, (metric, summed) in CLOCKS.items()
    }


def aligned(overlay: Overlay, own: Mapping[str, RunClock], alignment: str) -> dict[str, Series]:
    """The curves of another run over the steps of the open one.

    Args:
        overlay: the other run.
        own: the clocks of the open run.
        alignment: one of :data:`ALIGNMENTS`.

    Returns:
        Metric → curve; empty if the alignment needs a clock that one of the runs lacks.
    """
    if alignment == ALIGNMENTS[0]:
        return overlay.curves
    theirs, ours = overlay.clocks.get(alignment), own.get(alignment)
    if not theirs or not ours:
        return {}
    return {
        name: Series(
            (
                (ours.step_at(theirs.at(step)), value)
                for step, value in zip(curve.steps, curve.values, strict=True)
            ),
            fractional=True,
        )
        for name, curve in overlay.curves.items()
    }


def overlaid(
    overlays: Iterable[Overlay], own: Mapping[str, RunClock], alignment: str
) -> dict[str, dict[str, Series]]:
    """The aligned curves of several runs, by name; those without a clock are left out."""
    found = {o.name: aligned(o, own, alignment) for o in overlays if not o.problem}
    return {name: curves for name, curves in found.items() if curves}
