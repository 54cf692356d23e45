"""Where the ranks are in the current step, and how long it still takes."""

from collections.abc import Callable

from engine.metrics import EVALUATE, PHASES, PHASES_OF_SOME_RUNS, STEP_TIME, SYNC, phase_time
from engine.monitoring.step_timer import OptimiseEnd
from engine.protocol.rank_messages import Phase
from rlhf_tui.state.curves import Curves

BEFORE_SYNC = ("generate", "score")
"""The phases that `sync` may follow in a step with `rollout.ahead`."""


class StepProgress:
    """The phases of the ranks, from the engine's messages, and their usual length."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now`: the wall clock."""
        self.curves = Curves()
        """With the lengths of the phases so far."""
        self.eval_every = 0
        """Steps between held-out evaluations, by the configuration; 0 for none."""
        self.phases: list[Phase] = []
        """The newest phase of each rank, by rank; empty without an engine."""
        self._now = now
        self._since: dict[int, float] = {}
        self._optimise = OptimiseEnd()
        self._before_sync = ""
        """The phase that `sync` was last seen to follow in its step; empty if it came first."""

    def take(self, phases: list[Phase]) -> None:
        """Takes the current phases."""
        before = {p.rank: (p.name, p.step) for p in self.phases}
        for phase in phases:
            name, step = before.get(phase.rank, ("", 0))
            if (name, step) != (phase.name, phase.step):
                self._since[phase.rank] = self._now()
                if phase.name == SYNC:
                    same = step == phase.step and name in BEFORE_SYNC
                    self._before_sync = name if same else ""
        self.phases = phases
        if phases:
            self._optimise.take(phases[0], self._now())

    def step_phases(self, now: Phase) -> tuple[str, ...]:
        """The phases of a rank's current step, in order; always includes `now`.

        Before the first step is done or the configuration is read, others may be missing. `sync`
        comes first, or with `rollout.ahead` after `generate` or `score`, where it was seen.
        """
        absent = {p for p in PHASES_OF_SOME_RUNS if phase_time(p) not in self.curves.names}
        if not self.eval_every or now.step % self.eval_every:
            absent.add(EVALUATE)
        phases = [p for p in PHASES if p not in absent or p == now.name]
        if SYNC in phases and self._before_sync in phases:
            phases.remove(SYNC)
            phases.insert(phases.index(self._before_sync) + 1, SYNC)
        return tuple(phases)

    def phase_seconds(self, phase: str) -> float | None:
        """How long a phase usually takes: the mean of the last steps, or the last evaluation."""
        name = phase_time(phase)
        if phase == EVALUATE:
            return self.curves.series(name).last
        return self.curves.recent_mean(name)

    def seconds_in_phase(self, rank: int) -> float:
        """Seconds since a rank began its phase; 0 if the clock was set back since then."""
        now = self._now()
        return max(0.0, now - self._since.get(rank, now))

    def seconds_left(self) -> float | None:
        """Seconds until the current step is done, estimated; None if unknown.

        0 if the step takes longer than usual.
        """
        seconds = self.curves.recent_mean(STEP_TIME)
        if seconds is None or not self.phases:
            return None
        evaluation = 0.0
        if EVALUATE in self.step_phases(self.phases[0]):
            evaluation = self.phase_seconds(EVALUATE) or 0.0
        if (ends := self._optimise.ends) is not None:
            return max(0.0, ends - self._now()) + evaluation
        return max(0.0, seconds + evaluation - self._seconds_done())

    def _seconds_done(self) -> float:
        """Seconds since the current step began, its finished phases at their usual length."""
        phase = self.phases[0]
        phases = self.step_phases(phase)
        if phase.name not in phases:
            return 0.0
        before = phases[: phases.index(phase.name)]
        done = sum(self.phase_seconds(name) or 0.0 for name in before)
        return done + self.seconds_in_phase(phase.rank)
