"""The phase strip: the current phase of each rank with its progress, and the phases' durations."""

from engine import metrics
from engine.metrics import EVAL_TIME, PHASES, phase_time
from engine.protocol.rank_messages import Phase
from rlhf_tui import format as fmt
from rlhf_tui.state.time_left import about
from rlhf_tui.widgets.lines import Piece, Row, justified, row_width
from rlhf_tui.widgets.panels.panel import Panel, bar

UNITS = {"generate": "tokens", "optimise": "responses"}
SHOWN_SECONDS = 2
"""Seconds from which on it is shown how long a phase without progress lasts."""
PAUSED = "paused"
"""The phase of a rank between two steps of a paused run."""


class PhaseStrip(Panel):
    """One line per rank, as many as fit."""

    def rows(self, width: int, height: int) -> list[Row]:
        """The ranks furthest behind, if not all fit."""
        phases = self.state.progress.phases
        if self.state.unread:
            return [[(f" {self.state.unread}", "dim")]]
        if self.state.head.state == "starting":
            # Others are of the attempt before.
            phases = [p for p in phases if not _is_of_step(p) and p.name != PAUSED]
            if not phases:
                return [[(" starting: loading models and prompts …", "dim")]]
        if not self.state.live or not phases:
            return [self._last_step(width, "")]
        if self.state.head.state == "paused":
            return [self._last_step(width, "paused; ")]
        shown = sorted(phases, key=lambda p: (p.step, self._progress(p)))[: max(height, 1)]
        several = len(phases) > 1
        return [self._line(phase, width, several) for phase in sorted(shown, key=lambda p: p.rank)]

    def _progress(self, phase: Phase) -> float:
        """A rank's progress in its step, in phases; -1 while it loads."""
        if phase.name not in PHASES:
            return -1
        done = self.state.progress.step_phases(phase).index(phase.name)
        return done + (phase.done / phase.total if phase.total else 0)

    def _last_step(self, width: int, state: str) -> Row:
        """How long the last step and its phases took, after `state`."""
        times = [(n, s) for n in PHASES if (s := self._last(phase_time(n))) is not None]
        if not times:
            none = "reading …" if self.state.steps_unread else "no step measured yet"
            return [(f" {state}{none}", "dim")]
        total = self._last(metrics.STEP_TIME)
        pieces: list[Piece] = [(f" {state}last step took ", "dim")]
        pieces += [(f"{total or 0:.1f}s", ""), (": ", "dim")]
        while row_width(row := [*pieces, *_durations(times)]) > width and len(times) > 1:
            times.remove(min(times, key=lambda t: t[1]))  # the longest is why one looks here
        return row

    def _last(self, metric: str) -> float | None:
        series = self.state.curves.series(metric)
        return series.at(self.state.head.step) if metric == EVAL_TIME else series.last

    def _line(self, phase: Phase, width: int, several: bool) -> Row:
        lead: list[Piece] = [(f" rank {phase.rank}", "dim")] if several else []
        if not _is_of_step(phase):
            return self._loading(lead, phase, width)
        after = self._clock(phase)
        for times in (True, False):
            before, later = self._others(phase, times=times)
            room = width - row_width([*lead, *before, *later, *after])
            now = self._now(phase, room)
            if row_width(now) <= room:
                break
        return justified([*lead, *before, *now, *later], after, width)

    def _others(self, phase: Phase, *, times: bool) -> tuple[list[Piece], list[Piece]]:
        """The phases before and after this one, with their mean durations if `times`."""
        phases = self.state.progress.step_phases(phase)
        current = phases.index(phase.name)
        before: list[Piece] = []
        later: list[Piece] = []
        for i, name in enumerate(phases):
            seconds = self.state.progress.phase_seconds(name) if times else None
            took = f" {seconds:.1f}s" if seconds is not None else ""
            if i < current:
                before.append((f" ✓ {name}{took}", "dim"))
            elif i > current and name != "checkpoint":
                later.append((f" · {name}{took}", "dim"))
        return before, later

    def _now(self, phase: Phase, room: int) -> list[Piece]:
        pieces: list[Piece] = [(f" ▶ {phase.name}", "accent")]
        if not phase.total:
            # How a reward function gets on is unknown, but not for how long it has been called.
            seconds = self.state.progress.seconds_in_phase(phase.rank)
            if seconds >= SHOWN_SECONDS:
                pieces.append((f" {fmt.duration(seconds)}", "strong"))
            return pieces
        share = phase.done / phase.total
        pieces.append((f" {share:4.0%} ", "strong"))
        count = f" {phase.done:,}/{phase.total:,} {UNITS.get(phase.name, '')}"
        room -= row_width(pieces) + 1
        if room >= len(count) + 12:
            return [*pieces, *bar(share, min(room - len(count), 30)), (count, "dim")]
        return [*pieces, *bar(share, min(room, 20))] if room >= 4 else pieces

    def _clock(self, phase: Phase) -> list[Piece]:
        """The current step and the estimated seconds until its end."""
        pieces: list[Piece] = [(f"  step {phase.step}", "dim")]
        if left := about(self.state.boundary_in()):
            pieces.append((f"  {left} left", ""))
        return [*pieces, (" ", "")]

    def _loading(self, lead: list[Piece], phase: Phase, width: int) -> Row:
        seconds = fmt.duration(self.state.progress.seconds_in_phase(phase.rank))
        after: list[Piece] = [(f"{seconds} ", "dim")]
        now: list[Piece] = [*lead, (f" ▶ {phase.name} ", "accent")]
        if phase.total:
            now += bar(phase.done / phase.total, min(30, max(width - row_width(now) - 24, 4)))
            now.append((f" {phase.done:,}/{phase.total:,}", "dim"))
        else:
            now.append(("…", "dim"))
        return justified(now, after, width)


def _durations(times: list[tuple[str, float]]) -> list[Piece]:
    pieces: list[Piece] = []
    for name, seconds in times:
        pieces += [(f"{' · ' if pieces else ''}{name} ", "dim"), (f"{seconds:.1f}s", "")]
    return pieces


def _is_of_step(phase: Phase) -> bool:
    """Whether a rank is in a step. The evaluation before the first one has step 0."""
    return phase.name in PHASES and phase.step > 0
