"""The part of the run that all charts show, and the crosshair they share."""

import math

import msgspec
from msgspec import Struct

from rlhf_tui.state.runs.overlay import ALIGNMENTS
from rlhf_tui.state.series import Series
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import Marker

WEIGHTS = (0.0, 0.6, 0.9, 0.97)
"""Weights of the moving average, in the order of the key."""
MIN_STEPS = 10
CELL_SHARE = 0.02
"""Share of the window that a column of a chart is at most about: the mouse is no more exact."""


class Viewport(Struct):
    """Shared by the charts of one dashboard."""

    cursor: int | None = None
    width: float | None = None
    """Steps shown; None for all."""
    end: float | None = None
    """The last step shown; None: about the newest one."""
    following: bool = True
    """Whether the window moves on when the run passes its end."""
    weight: float = WEIGHTS[1]
    past: bool = True
    """Whether earlier attempts are shown."""
    others: dict[str, dict[str, Series]] = msgspec.field(default_factory=dict)
    """Other sessions' curves over the steps of this one, by session and metric."""
    wanted: list[str] = msgspec.field(default_factory=list)
    """The sessions to overlay. Their curves are in `others` once they are read."""
    alignment: str = ALIGNMENTS[0]
    """What they are aligned by, one of :data:`~rlhf_tui.state.runs.overlay.ALIGNMENTS`."""
    selected: str | None = None
    """The key of the selected entry of the timeline; None if none is."""

    def window(self, state: SessionState) -> tuple[float, float]:
        """The first and the last step shown.

        The right end moves in jumps: moving it with every step would redraw whole charts.
        """
        first, full = self._first(state), self._whole(state)
        if self.width is None:
            return first, full
        if self.end is not None and not (self.following and state.head.step > self.end):
            return self.end - self.width, self.end
        jump = max(1, round(self.width / 8))
        end = math.ceil(max(state.head.step, 1) / jump) * jump
        return max(first, end - self.width), max(end, first + self.width)

    def _first(self, state: SessionState) -> float:
        """The first step of the visible curves: 0 if one begins with an evaluation."""
        starts = (s.steps[0] for found in self.others.values() for s in found.values() if s)
        return float(min([state.curves.first_step, *starts]))

    def _whole(self, state: SessionState) -> float:
        """The last step of the longest visible curve; rounded up if it is this run's."""
        end = round_end(state.head.step, state.head.total_steps)
        curves = (s for found in self.others.values() for s in found.values() if s)
        return max([end, *(s.steps[-1] for s in curves)])

    def overlays(self) -> list[tuple[str, str, dict[str, Series]]]:
        """Each overlaid session: the letter that marks its curves, its name, its curves."""
        return [
            (chr(ord("a") + i % 26), name, curves)
            for i, (name, curves) in enumerate(self.others.items())
        ]

    def zoom(self, state: SessionState, factor: float, around: float | None = None) -> None:
        """Shows fewer (factor below 1) or more steps. Follows the run if the newest one is shown.

        Args:
            state: the session.
            factor: of the number of steps.
            around: the step that keeps its place. Default: the crosshair, or else the newest step.
        """
        first, last = self.window(state)
        newest = max(state.head.step, 1)
        width = max((last - first) * factor, MIN_STEPS)
        if width >= self._whole(state) - self._first(state):
            self.all()
            return
        self.width = width
        centre = self.cursor if around is None else around
        if centre is None and last >= newest:
            self.end, self.following = None, True
            return
        centre = centre if centre is not None else (first + last) / 2
        share = (centre - first) / max(last - first, 1)
        self._end_at(state, centre + width * (1 - min(max(share, 0), 1)))

    def pan(self, state: SessionState, share: float) -> None:
        """Moves the window by a share of its width. It follows the run if it shows its end."""
        first, last = self.window(state)
        if self.width is None:
            return
        self._end_at(state, last + share * (last - first))

    def _end_at(self, state: SessionState, end: float) -> None:
        width = self.width or 0
        newest = max(state.head.step, 1)
        self.end = max(end, self._first(state) + width)
        if newest - width * CELL_SHARE < self.end < newest:
            self.end = float(newest)
        self.following = self.end >= newest
        if self.end >= newest + width / 8:
            self.end = None

    def all(self) -> None:
        """Shows the whole run."""
        self.width = self.end = None
        self.following = True

    def marker(self, state: SessionState) -> Marker | None:
        """The selected entry of the timeline."""
        if self.selected is None:
            return None
        return next((m for m in state.timeline.entries() if m.key == self.selected), None)

    def select(self, state: SessionState, marker: Marker) -> None:
        """Selects an entry and puts the crosshair on its step, or on the newest one before it."""
        self.put(state, marker.step)
        self.selected = marker.key

    def clear(self) -> None:
        """Removes the crosshair."""
        self.cursor = self.selected = None

    def move(self, state: SessionState, steps: float) -> None:
        """Moves the crosshair; it appears at the newest step."""
        newest = max(state.head.step, 1)
        if self.cursor is None:
            self.put(state, newest)
            return
        self.put(state, self.cursor + round(steps))

    def put(self, state: SessionState, step: int) -> None:
        """Sets the crosshair to a step and brings it into the window."""
        self.selected = None
        newest = max(state.head.step, 1)
        self.cursor = min(max(step, int(self._first(state))), newest)
        first, last = self.window(state)
        if self.width is not None and not first <= self.cursor <= last:
            self._end_at(state, self.cursor + self.width / 2)

    def stride(self, state: SessionState, cells: int) -> float:
        """Steps per cell of a chart, at least one."""
        first, last = self.window(state)
        return max(1.0, (last - first) / max(cells, 1))


def round_end(step: int, total: int) -> float:
    """A round step somewhat beyond the newest one, but not beyond the run's end."""
    want = max(step, MIN_STEPS)
    power = 10.0 ** math.floor(math.log10(want))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    end = next(m * power for m in steps if m * power >= want)
    return max(min(end, float(total)) if total else end, step, MIN_STEPS)
