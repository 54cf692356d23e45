"""The state of the open session, assembled from the updates of the feed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.journal.rows import (
    AlertEvent,
    AttemptEvent,
    CheckpointEvent,
    CheckpointRow,
    CommandRow,
    EventRow,
    NoteEvent,
    ReferenceEvent,
    SampleRow,
)
from engine.metrics import (
    BETA,
    CLIP_FRACTION,
    KL,
    PEAK_MEMORY,
    PHASES,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
    TOKENS_PER_SECOND,
    phase_time,
)
from engine.protocol.client_messages import Telemetry
from engine.protocol.commands import COMMANDS, Undo
from engine.protocol.rank_messages import Phase
from rlhf_tui.format import number
from rlhf_tui.state import time_left
from rlhf_tui.state.series import Series, Smoothed
from rlhf_tui.state.updates import SessionSummary, SessionUpdate, thinned

ALWAYS = (
    SCORE, KL, CLIP_FRACTION, BETA, RESPONSE_LENGTH, STEP_TIME, TOKENS_PER_SECOND, PEAK_MEMORY,
    *map(phase_time, PHASES),
)  # fmt: skip
"""Metrics that are always read, whichever charts are shown."""
RECENT = 10
"""Steps of `recent_mean`, and of the means before and after an intervention."""


@dataclass(frozen=True)
class Marker:
    """An event that is shown on the charts."""

    step: int
    kind: str
    """command, checkpoint, attempt, alert or note."""
    text: str
    who: str = ""
    time: float = 0.0


MARKER_GLYPHS = {"command": "◆", "checkpoint": "▲", "attempt": "┃", "alert": "!", "note": "✎"}
MARKER_TONES = {
    "command": "accent",
    "checkpoint": "good",
    "attempt": "dim",
    "alert": "warn",
    "note": "key",
}


class SessionState:
    """Filled by :meth:`take` and read by the widgets. Use it in the app's thread only."""

    def __init__(
        self, name: str = "", batch_size: int = 1, now: Callable[[], float] = time.time
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.now = now
        self.phases: list[Phase] = []
        self.telemetry: Telemetry | None = None
        self.connected = False
        self.problem = ""
        self.phase_since: dict[int, float] = {}
        self._clear()

    def _clear(self) -> None:
        self.head = SessionSummary("starting", 0, 0, {}, "", [], None, None)
        self.known = False
        """Whether anything was read yet."""
        self.curves: dict[str, Series] = {}
        self.outlines: dict[str, Series] = {}
        """Outlines of curves that are still being read."""
        self.past: dict[str, list[Series]] = {}
        self.names: list[str] = []
        self.events: list[EventRow] = []
        self.commands: list[CommandRow] = []
        self.checkpoints: list[CheckpointRow] = []
        self.samples: list[SampleRow] = []
        self.labels: tuple[int, ...] = ()
        """Changes whenever somebody labels a response."""
        self._smoothed: dict[tuple[str, float], Smoothed] = {}
        self._markers: list[Marker] | None = None

    def take(self, update: SessionUpdate) -> None:
        """Adds an update."""
        if update.reset:
            self._clear()
        if update.head is not None:
            self.head, self.known, self._markers = update.head, True, None
        self.outlines |= {n: Series(points) for n, points in update.outlines.items()}
        for name, points in update.curves.items():
            self.outlines.pop(name, None)
            self.curves.setdefault(name, Series()).extend(points)
        for name, rows in update.past.items():
            by_attempt: dict[int, list[tuple[int, float | None]]] = {}
            for attempt, step, value in rows:
                by_attempt.setdefault(attempt, []).append((step, value))
            self.past[name] = [Series(points) for points in by_attempt.values()]
        if update.events:
            self.events = thinned(self.events + update.events)
            self._markers = None
        if update.labels is not None:
            self.labels = update.labels
        for key in ("names", "commands", "checkpoints", "samples", "telemetry", "connected"):
            if (value := getattr(update, key)) is not None:
                setattr(self, key, value)
                self._markers = None
        if update.connected is False:
            self.telemetry = None
        if update.phases is not None:
            self._take_phases(update.phases)
        if update.problem is not None:
            self.problem = update.problem

    def _take_phases(self, phases: list[Phase]) -> None:
        before = {p.rank: (p.name, p.step) for p in self.phases}
        for phase in phases:
            if before.get(phase.rank) != (phase.name, phase.step):
                self.phase_since[phase.rank] = self.now()
        self.phases = phases

    # -- the numbers ---------------------------------------------------------------------------

    def series(self, name: str) -> Series:
        """A metric's values; empty where it is unknown."""
        return self.curves.get(name) or Series()

    def outline(self, name: str) -> Series | None:
        """The shape of a curve that is not read yet; None once it is."""
        return None if name in self.curves else self.outlines.get(name)

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
    def training(self) -> bool:
        """Whether the engine takes steps."""
        return self.live and self.head.state in ("running", "pausing", "stopping")

    def seconds_left(self) -> float | None:
        """Seconds until the end of the run, at the mean of the last steps; None if unknown."""
        seconds, head = self.recent_mean(STEP_TIME), self.head
        if seconds is None or not head.total_steps:
            return None
        return time_left.until_end(head.step, head.total_steps, seconds)

    def boundary_in(self) -> float | None:
        """Seconds until the current step is done, estimated; None if no step is running."""
        seconds = self.recent_mean(STEP_TIME)
        if seconds is None or not self.training or not self.phases:
            return None
        return time_left.until_boundary(seconds, self._into_step())

    def _into_step(self) -> float:
        """Seconds since the current step began, its finished phases at their usual length."""
        phase = self.phases[0]
        if phase.name not in PHASES:
            return 0.0
        done = sum(
            self.recent_mean(phase_time(name)) or 0.0 for name in PHASES[: PHASES.index(phase.name)]
        )
        return done + self.now() - self.phase_since.get(phase.rank, self.now())

    # -- events -------------------------------------------------------------------------

    def pending(self) -> list[CommandRow]:
        """Commands that have not ended."""
        return [c for c in self.commands if c.status in ("queued", "accepted")]

    def beta_source(self, *, short: bool = False) -> str:
        """Where the beta in force comes from."""
        manual = next(
            (
                c
                for c in reversed(self.commands)
                if c.status == "applied" and c.live and _changes(c, "beta")
            ),
            None,
        )
        if manual is not None:
            person, step = manual.who.split(" ")[0], manual.applied_step
            if short:
                return f"{person} @{step}"
            if self.setting("controller") == "adaptive":
                return f"continues from {person}'s, step {step}"
            return f"set by {person} at step {step}"
        return "controller" if self.setting("controller") == "adaptive" else "configuration"

    def markers(self) -> list[Marker]:
        """Everything that is shown on the charts, by step."""
        if self._markers is None:
            found = [m for e in self.events if (m := _event_marker(e)) is not None]
            found += [_command_marker(c) for c in self.commands if _shown(c)]
            self._markers = sorted(found, key=lambda m: (m.step, m.time))
        return self._markers

    def before_and_after(self, name: str, step: int) -> tuple[float | None, float | None]:
        """A metric's mean over the steps before one, and over those from it on."""
        series = self.series(name)
        return series.mean(step - RECENT, step - 1), series.mean(step, step + RECENT - 1)


def _changes(command: CommandRow, key: str) -> bool:
    return any(change.key == key for change in command.changes)


def _shown(command: CommandRow) -> bool:
    """Whether a command is shown on the charts; a command of a newer version is."""
    kind = COMMANDS.get(command.command)
    return (
        command.status == "applied"
        and command.live
        and command.applied_step is not None
        and (kind is None or kind.on_charts)
    )


def command_text(command: CommandRow) -> str:
    """Returns a command as text: `beta 0.05 → 0.08`, `pause`."""
    if command.changes:
        text = ", ".join(
            f"{c.key} {value_text(c.old)} → {value_text(c.new)}" for c in command.changes
        )
        return f"undo: {text}" if command.command == Undo.name() else text
    given = " ".join(value_text(v) for v in command.args.values() if v not in (None, False))
    return f"{command.command} {given}".strip()


def value_text(value: Any) -> str:
    """Returns a setting's value as short text."""
    if value is None:
        return "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _command_marker(command: CommandRow) -> Marker:
    return Marker(
        command.applied_step or 0,
        "command",
        command_text(command),
        command.who,
        command.ended or command.queued,
    )


def _event_marker(event: EventRow) -> Marker | None:
    step, when = event.step, event.time
    match event.payload:
        case CheckpointEvent(score=score, kl=kl):
            text = f"checkpoint, score {number(score)}, KL {number(kl, 2)}"
            return Marker(step, "checkpoint", text, time=when)
        case AttemptEvent(attempt=attempt, from_step=first) if attempt > 1:
            text = f"attempt {attempt} resumes from step {first}"
            return Marker(first, "attempt", text, time=when)
        case AlertEvent(rule=rule, text=text):
            text = f"{rule}: {text.removeprefix('look here: ')}"
            return Marker(step, "alert", text, time=when)
        case ReferenceEvent(mix=mix):
            return Marker(step, "command", f"reference: {mix:.0%} policy", "schedule", when)
        case NoteEvent(text=text, who=who):
            return Marker(step, "note", text, who, when)
        case _:
            return None
