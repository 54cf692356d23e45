"""The steps of markers by kind. A chart draws them without looking at every marker."""

from bisect import bisect_left
from collections.abc import Iterable

from rlhf_tui.state.timeline import Marker


class MarkedSteps:
    """Ascending steps of markers, by (kind, abandoned)."""

    def __init__(self, markers: Iterable[Marker] = ()) -> None:
        """`markers` can be in any order."""
        self._steps: dict[tuple[str, bool], list[int]] = {}
        for marker in markers:
            self._steps.setdefault((marker.kind, marker.abandoned), []).append(marker.step)
        for steps in self._steps.values():
            steps.sort()

    def first_from(self, step: float, kind: str, *, abandoned: bool) -> int | None:
        """The first step from `step` on that has a marker of a kind; None if there is none."""
        steps = self._steps.get((kind, abandoned), [])
        i = bisect_left(steps, step)
        return steps[i] if i < len(steps) else None
