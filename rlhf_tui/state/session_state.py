"""The state of the open session, assembled from the updates of the feed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.agreement import Agreement
from engine.journal.rows import CheckpointRow, CommandRow, EventRow, SampleRow
from engine.metrics import (
    AGREEMENT,
    BETA,
    CLIP_FRACTION,
    EVAL_SCORE,
    EVALUATE,
    KL,
    PEAK_MEMORY,
    PHASES,
    PHASES_OF_SOME_RUNS,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
    SYNC,
    TOKENS_PER_SECOND,
    phase_time,
    with_drawn,
)
from engine.monitoring.step_timer import OptimiseEnd
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.file_signature import FileSignature
from rlhf_tui import format as fmt
from rlhf_tui.state import time_left
from rlhf_tui.state.feeds.updates import (
    ReplayStatus,
    SessionSummary,
    SessionUpdate,
    newest_events,
)
from rlhf_tui.state.marked_steps import MarkedSteps
from rlhf_tui.state.series import Series, Smoothed
from rlhf_tui.state.timeline import Marker, pause_reason, sender, timeline

ALWAYS = (
    *with_drawn((SCORE, KL, CLIP_FRACTION, BETA, RESPONSE_LENGTH)),
    STEP_TIME, TOKENS_PER_SECOND, PEAK_MEMORY, *map(phase_time, PHASES),
)  # fmt: skip
"""Metrics that are always read, whichever charts are shown."""
BEFORE_SYNC = ("generate", "score")
"""The phases that `sync` may follow in a step with `rollout.ahead`."""
RECENT = 10
"""Steps of `recent_mean`, and of the means before and after an intervention."""


class SessionState:
    """Filled by :meth:`take` and read by the widgets. Use it in the app's thread only."""

    def __init__(
        self,
        name: str = "",
        now: Callable[[], float] = time.time,
        root: Path | None = None,
    ) -> None:
        """Creates an empty state.

        Args:
            name: of the session.
            now: the wall clock.
            root: the folder of sessions; None: commands name no folder.
        """
        self.name = name
        self._root = root
        self.batch_size: int | None = None
        """Responses per step; None until the configuration is read."""
        self.eval_every = 0
        """Steps between held-out evaluations, by the configuration; 0 for none."""
        self.best_metric = SCORE
        """The metric by which the best checkpoints are kept."""
        self.keep_last = self.keep_best = 0
        """How many of the newest and of the best checkpoints are kept; 0 until it is read."""
        self.now = now
        self.phases: list[Phase] = []
        self.telemetry: Telemetry | None = None
        self.connected = False
        self.refused = ""
        """Why the engine takes no further viewer; empty if it does."""
        self.problem = ""
        self.stale = ""
        """Why the copy of another machine's session is not kept up to date; empty while it is."""
        self.replay: ReplayStatus | None = None
        """Where the replay is that is shown; None for a session as it is now."""
        self.phase_since: dict[int, float] = {}
        self._optimise = OptimiseEnd()
        self._before_sync = ""
        """The phase that `sync` was last seen to follow in its step; empty if it came first."""
        self._clear()

    def _clear(self) -> None:
        self.head = SessionSummary("starting", 0, 0, {}, "", [], None, None)
        self.known = False
        """Whether anything was read yet."""
        self.curves: dict[str, Series] = {}
        self.downsampled: dict[str, Series] = {}
        """Downsampled curves that are still being read."""
        self.past: dict[str, list[Series]] = {}
        self.names: list[str] = []
        self.events: list[EventRow] = []
        self.commands: list[CommandRow] = []
        self.checkpoints: list[CheckpointRow] = []
        self.samples: list[SampleRow] = []
        self.labels: FileSignature = ()
        """Changes whenever somebody labels a response."""
        self.agreement = Agreement()
        """How far the scores agree with the judgements."""
        self._smoothed: dict[tuple[str, float], Smoothed] = {}
        self._reached: dict[int, int] = {}
        """Attempt → its last step, where a later attempt replaced that step."""
        self._timeline: list[Marker] | None = None
        self._markers: list[Marker] | None = None
        self._marked_steps: MarkedSteps | None = None

    def command(self, *words: str) -> str:
        """A command of rlhf-tui about this session, as it can be typed once the app is left."""
        return fmt.command(*words, root=self._root)

    @property
    def unread(self) -> str:
        """The text shown for everything that is unknown before the first reading; later empty."""
        if self.known:
            return ""
        return "cannot be read" if self.problem else "reading …"

    @property
    def steps_unread(self) -> bool:
        """Whether there are steps, of which only downsampled curves were read so far."""
        return bool(self.head.step) and not self.curves

    def take(self, update: SessionUpdate) -> None:
        """Adds an update."""
        if update.replay is not None:
            self.replay = update.replay  # before all else: it is the clock of what follows
        if update.reset:
            self._clear()
        if self._changes_timeline(update):
            self._timeline = None
        if update.head is not None:
            self.head, self.known = update.head, True
        self.downsampled |= {n: Series(points) for n, points in update.downsampled.items()}
        for name, points in update.curves.items():
            self.downsampled.pop(name, None)
            self.curves.setdefault(name, Series()).extend(points)
        self._take_past(update)
        if update.events:
            self.events = newest_events(self.events + update.events)
        for key in (
            "names", "commands", "checkpoints", "samples", "labels", "agreement",
            "telemetry", "connected", "refused", "problem",
        ):  # fmt: skip
            if (value := getattr(update, key)) is not None:
                setattr(self, key, value)
        if update.agreement is not None:
            self.curves[AGREEMENT] = Series(update.agreement.curve)
        if update.connected is False:
            self.telemetry = None
        if update.phases is not None:
            self._take_phases(update.phases)

    def _take_past(self, update: SessionUpdate) -> None:
        for name, rows in update.past.items():
            by_attempt: dict[int, list[tuple[int, float | None]]] = {}
            for attempt, step, value in rows:
                by_attempt.setdefault(attempt, []).append((step, value))
            self.past[name] = [Series(points) for points in by_attempt.values()]
            for attempt, points in by_attempt.items():
                self._reached[attempt] = max(self._reached.get(attempt, 0), points[-1][0])

    def _changes_timeline(self, update: SessionUpdate) -> bool:
        """Whether the timeline must be rebuilt. Most steps do not change it."""
        if update.events or update.past or update.commands is not None:
            return True
        now, then = update.head, self.head
        return now is not None and (now.attempts, now.state) != (then.attempts, then.state)

    def _take_phases(self, phases: list[Phase]) -> None:
        before = {p.rank: (p.name, p.step) for p in self.phases}
        for phase in phases:
            name, step = before.get(phase.rank, ("", 0))
            if (name, step) != (phase.name, phase.step):
                self.phase_since[phase.rank] = self.now()
                if phase.name == SYNC:
                    same = step == phase.step and name in BEFORE_SYNC
                    self._before_sync = name if same else ""
        self.phases = phases
        if phases:
            self._optimise.take(phases[0], self.now())

    # -- the numbers ---------------------------------------------------------------------------

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics that a chart can show."""
        return [*self.names, AGREEMENT] if self.agreement.points else self.names

    def series(self, name: str) -> Series:
        """A metric's values; empty where it is unknown."""
        return self.curves.get(name) or Series()

    def downsampled_curve(self, name: str) -> Series | None:
        """The shape of a curve that is not read yet; None once it is."""
        return None if name in self.curves else self.downsampled.get(name)

    def shape(self, name: str) -> Series:
        """A metric's values, or, until they are read, the downsampled ones."""
        return self.downsampled_curve(name) or self.series(name)

    @property
    def evaluated(self) -> bool:
        """Whether the run has responses to held-out prompts."""
        return bool(self.shape(EVAL_SCORE)) or EVAL_SCORE in self.names

    @property
    def first_step(self) -> int:
        """The first step that charts show: 0 if the run was evaluated before the first step."""
        found = self.shape(EVAL_SCORE)
        return 0 if found and not found.steps[0] else 1

    def step_phases(self, now: Phase) -> tuple[str, ...]:
        """The phases of a rank's current step, in order; always includes `now`.

        Before the first step is done or the configuration is read, others may be missing. `sync`
        comes first, or with `rollout.ahead` after `generate` or `score`, where it was seen.
        """
        absent = {p for p in PHASES_OF_SOME_RUNS if phase_time(p) not in self.names}
        if not self.eval_every or now.step % self.eval_every:
            absent.add(EVALUATE)
        phases = [p for p in PHASES if p not in absent or p == now.name]
        if SYNC in phases and self._before_sync in phases:
            phases.remove(SYNC)
            phases.insert(phases.index(self._before_sync) + 1, SYNC)
        return tuple(phases)

    def smoothed(self, name: str, weight: float) -> Series:
        """A metric's moving average."""
        source = self.curves.get(name)
        if source is None or not weight:
            return source or Series()
        found = self._smoothed.get((name, weight))
        if found is None or found.source is not source:
            found = self._smoothed[name, weight] = Smoothed(source, weight)
        found.follow()
        return found

    def recent_mean(self, name: str) -> float | None:
        """The mean of the last steps."""
        return self.series(name).mean(self.head.step - RECENT + 1, self.head.step)

    def setting(self, key: str) -> Any:
        """A setting in force, None where unknown."""
        return self.head.settings.get(key)

    @property
    def live(self) -> bool:
        """Whether an engine runs."""
        return self.head.pid is not None

    @property
    def starting(self) -> bool:
        """Whether an engine is loading the models: until then the settings in force are unknown."""
        return self.live and self.head.state == "starting"

    @property
    def waiting(self) -> bool:
        """Whether the engine waits for something from outside: room on the disk, a machine."""
        return self.live and any(phase.waits_for for phase in self.phases)

    @property
    def training(self) -> bool:
        """Whether the engine is training."""
        return self.live and self.head.state in ("running", "pausing", "stopping")

    def seconds_left(self) -> float | None:
        """Seconds until the end of the run, at the mean of the last steps; None if unknown."""
        seconds, head = self.recent_mean(STEP_TIME), self.head
        if seconds is None or not head.total_steps:
            return None
        return time_left.until_end(head.step, head.total_steps, seconds)

    def boundary_in(self) -> float | None:
        """Seconds until the current step is done, estimated; None if no step is running.

        None also while the run waits. 0 if the step takes longer than usual.
        """
        seconds = self.recent_mean(STEP_TIME)
        if seconds is None or not self.training or not self.phases or self.waiting:
            return None
        evaluation = 0.0
        if EVALUATE in self.step_phases(self.phases[0]):
            evaluation = self.phase_seconds(EVALUATE) or 0.0
        if (ends := self._optimise.ends) is not None:
            return max(0.0, ends - self.now()) + evaluation
        return max(0.0, seconds + evaluation - self._into_step())

    def phase_seconds(self, phase: str) -> float | None:
        """How long a phase usually takes: the mean of the last steps, or the last evaluation."""
        name = phase_time(phase)
        return self.series(name).last if phase == EVALUATE else self.recent_mean(name)

    def _into_step(self) -> float:
        """Seconds since the current step began, its finished phases at their usual length."""
        phase = self.phases[0]
        phases = self.step_phases(phase)
        if phase.name not in phases:
            return 0.0
        before = phases[: phases.index(phase.name)]
        done = sum(self.phase_seconds(name) or 0.0 for name in before)
        return done + self.seconds_in_phase(phase.rank)

    def seconds_in_phase(self, rank: int) -> float:
        """Seconds since a rank began its phase; 0 if the clock was set back since then."""
        now = self.now()
        return max(0.0, now - self.phase_since.get(rank, now))

    # -- events -------------------------------------------------------------------------

    def pending(self) -> list[CommandRow]:
        """Commands that have not ended."""
        return [c for c in self.commands if c.status in ("queued", "accepted")]

    def beta_source(self, *, short: bool = False) -> str:
        """Where the beta in force comes from."""
        manual = next((c for c in reversed(self.commands) if self._sets_beta(c)), None)
        if manual is not None:
            person, step = sender(manual.who), manual.applied_step
            if short:
                return f"{person} @{step}"
            if self.setting("controller") == "adaptive":
                return f"continues from {person}'s, step {step}"
            return f"set by {person} at step {step}"
        return "controller" if self.setting("controller") == "adaptive" else "configuration"

    def _sets_beta(self, command: CommandRow) -> bool:
        """Whether a command up to now changed beta, or fixed it where the controller had moved it.

        After a restart, a command that was applied may follow later.
        """
        return (
            command.status == "applied"
            and command.live
            and (command.applied_step or 0) <= self.head.step + 1
            and any(
                change.key == "beta"
                or (change.key == "controller" and change.new == "fixed" != change.old)
                for change in command.changes
            )
        )

    def pause_reason(self) -> str | None:
        """What paused the run; None if a person did, or if it is not paused."""
        head = self.head
        return head.pause_reason or pause_reason(head.state, self.events, self.commands)

    def timeline(self) -> list[Marker]:
        """The entries of the timeline, oldest first, including abandoned branches."""
        if self._timeline is None:
            head = self.head
            self._timeline = timeline(
                self.events,
                self.commands,
                head.attempts,
                reached=self._reached,
                crashed_at=head.step if head.state == "crashed" else None,
            )
            self._markers = None
        return self._timeline

    def markers(self) -> list[Marker]:
        """The entries of the timeline that the charts show, by step."""
        entries = self.timeline()
        if self._markers is None:
            shown = [m for m in entries if m.kind != "end" and m.step >= 1]
            self._markers = sorted(shown, key=lambda m: m.step)
            self._marked_steps = None
        return self._markers

    def marked_steps(self) -> MarkedSteps:
        """The steps of :meth:`markers`, by kind."""
        markers = self.markers()
        if self._marked_steps is None:
            self._marked_steps = MarkedSteps(markers)
        return self._marked_steps

    def before_and_after(self, name: str, step: int) -> tuple[float | None, float | None]:
        """A metric's mean over the steps before one, and over those from it on."""
        series = self.series(name)
        return series.mean(step - RECENT, step - 1), series.mean(step, step + RECENT - 1)
