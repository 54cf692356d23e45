"""The timeline of a run, in the order of the journal's sequence numbers, and why it is paused.

A roll back keeps the entries of the abandoned branch, which are marked. An engine that died leaves
no event, so its end is inferred: an attempt follows one that did not end.
"""

import bisect
import functools
import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from engine.config.settings import SettingChange
from engine.journal.rows import (
    AlertEvent,
    AttemptEvent,
    AttemptRow,
    CheckpointEvent,
    CommandEvent,
    CommandRow,
    ErrorEvent,
    EventRow,
    NoteEvent,
    ReadyEvent,
    ReferenceEvent,
    StateEvent,
    engine_died_before,
)
from engine.metrics import title_of
from engine.protocol.commands import (
    COMMANDS,
    Checkpoint,
    DeleteCheckpoint,
    Note,
    Pause,
    Rollback,
    Stop,
    Undo,
    Unpause,
)
from engine.session.states import ENDED_STATES
from rlhf_tui.format import change, number, value_text

MARKER_GLYPHS = {
    "command": "◆", "checkpoint": "▲", "attempt": "┃", "alert": "!", "note": "✎", "crash": "✗",
    "end": "■",
}  # fmt: skip
"""Kind of a marker → its sign."""
MARKER_TONES = {
    "command": "accent",
    "checkpoint": "good",
    "attempt": "dim",
    "alert": "warn",
    "note": "key",
    "crash": "bad",
    "end": "dim",
}
GUARD_RAIL = "guard rail "
"""Prefix of the sender's name for a guard rail's command; the name of its rule follows."""
RESTART = "restart"
"""Rule of the notice that follows the error of an attempt and repeats its text."""
PAUSED_STATES = ("paused", "pausing")
EFFECTS_ON_STEP_BEFORE = {
    Checkpoint.name(): "step {step} saved",
    Pause.name(): "paused {after}",
    Stop.name(): "stopped {after}",
}
"""What commands have done whose effect is on the step before the one that they are applied at."""
WITHOUT_STEP = {Note.name(): "added", DeleteCheckpoint.name(): "done"}
"""What is said of applied commands that apply to no step."""
_BOUND = re.compile(
    r"(?P<metric>\S+) is (?P<value>\S+), (?P<side>above|below) (?P<bound>[^;\n]+)"
    r"(?:; (?P<again>alert \d+), .+)?"
)
_PREDICTED = re.compile(
    r"(?P<metric>\S+) is (?P<value>\S+) and rises: (?P<predicted>\S+) in (?P<ahead>\d+) steps is "
    r"above (?P<bound>[^;\n]+)(?:; (?P<again>alert \d+), .+)?"
)
_SEE_LOGS = re.compile(
    r"; see ('[^']*'|\S*rlhf-tui) logs \S+?"
    r"( --sessions ('[^']*'(\"'\"'[^']*')*|\S+?))?(?=[;:,]?(\s|$))"
)
"""What follows the command, such as why the run was not restarted, stays."""
SEE_LOG = "see 5 Log"
DIED = "engine died (no exit message)"


class Marker(Struct, frozen=True):
    """An entry of the timeline, which the charts mark at its step."""

    step: int
    kind: str
    """A key of :data:`MARKER_GLYPHS`."""
    text: str
    who: str = ""
    time: float = 0.0
    key: str = ""
    """Identifies it in its session, also after the journal was read again."""
    abandoned: bool = False
    """Whether it belongs to an abandoned branch."""
    event: EventRow | None = None
    """The event of the entry; None for a command and for an engine that died."""
    after: int = 0
    """Id of the last event that had been recorded with it; 0 if that is not known."""


def in_app(text: str) -> str:
    """A message of an engine with the screen of the log instead of the command that prints it."""
    return _SEE_LOGS.sub(f"; {SEE_LOG}", text)


def command_text(command: CommandRow) -> str:
    """Returns a command as text: `beta 0.05 → 0.08`, `pause`."""
    if command.changes:
        return applied_text(command.command, command.changes)
    if command.command == Rollback.name():
        reseeded = ", new random seed" if command.args.get("reseed") else ""
        return f"roll back to step {command.args.get('step')}{reseeded}"
    if command.command == Stop.name():
        return "stop now" if command.args.get("now") else "stop"
    if command.command == Checkpoint.name():
        return command.command
    given = " ".join(value_text(v) for v in command.args.values() if v not in (None, False))
    return f"{command.command} {given}".strip()


def applied_text(command: str, changes: Sequence[SettingChange]) -> str:
    """Returns what a command of this name changed: `beta 0.05 → 0.08`, `undo: beta 0.08 → 0.05`."""
    text = changes_text(changes)
    return f"undo: {text}" if command == Undo.name() else text


def effect_text(command: str, step: int) -> str:
    """Returns what an applied command has done if that is about the step before the one it names.

    A command that is applied at step 76 is carried out between the steps 75 and 76: the checkpoint
    is that of step 75.

    Args:
        command: its name.
        step: at which it was applied.

    Returns:
        `step 75 saved`, `paused after step 75` or `stopped after step 75`; empty for any other.
    """
    after = f"after step {step - 1}" if step > 1 else "before the first step"
    return EFFECTS_ON_STEP_BEFORE.get(command, "").format(step=step - 1, after=after)


def outcome_text(command: str, step: int | None) -> str:
    """Returns what an applied command has done: :func:`effect_text`, `applied at step 76`, `added`.

    Args:
        command: its name.
        step: at which it was applied; None if it is not recorded.
    """
    if command in WITHOUT_STEP:
        return WITHOUT_STEP[command]
    if step is None:
        return "applied"
    return effect_text(command, step) or f"applied at step {step}"


def changes_text(changes: Sequence[SettingChange]) -> str:
    """Returns `beta 0.05 → 0.08, target 6 → 8`.

    Settings that a command named but did not change are left out, unless it changed none.
    """
    changed = [c for c in changes if c.old != c.new] or changes
    return ", ".join(change(c.key, c.old, c.new) for c in changed)


def sender(who: str) -> str:
    """Returns who sent a command, without terminal and address: `ana`, `guard rail`."""
    return GUARD_RAIL.strip() if who.startswith(GUARD_RAIL) else who.partition(" ")[0]


def timeline(
    events: Sequence[EventRow],
    commands: Sequence[CommandRow],
    attempts: Sequence[AttemptRow],
    *,
    reached: dict[int, int],
    crashed_at: int | None = None,
) -> list[Marker]:
    """Returns the entries, oldest first.

    Args:
        events: oldest first; the oldest ones may be missing.
        commands: all of them, in order of arrival.
        attempts: all of them, in order.
        reached: attempt → its last step, where a later attempt replaced that step.
        crashed_at: the last step if the newest engine died; None if it did not.
    """
    return _Timeline(events, commands, attempts, reached).entries(crashed_at)


def folded(markers: Iterable[Marker]) -> list[list[Marker]]:
    """Groups consecutive checkpoints, in the order of the markers.

    Each other marker is a group of its own. Abandoned branches are grouped separately.
    """
    groups: list[list[Marker]] = []
    for marker in markers:
        last = groups[-1][-1] if groups else None
        both = last is not None and last.kind == marker.kind == "checkpoint"
        if last is not None and both and last.abandoned == marker.abandoned:
            groups[-1].append(marker)
        else:
            groups.append([marker])
    return groups


class _Timeline:
    def __init__(
        self,
        events: Sequence[EventRow],
        commands: Sequence[CommandRow],
        attempts: Sequence[AttemptRow],
        reached: dict[int, int],
    ) -> None:
        self._events = events
        self._commands = {c.id: c for c in commands}
        self._attempts = {a.attempt: a for a in attempts}
        self._reached = reached
        self._rolled_back = {
            c.attempt for c in commands if c.command == Rollback.name() and c.status == "applied"
        }
        """Attempts that a roll back ended."""
        self._kept: dict[int, int | None] = {}
        """Attempt → the last step that later attempts kept of it; None if all."""
        self._error = ""
        """The error that ended the attempt."""
        self._ended = False
        """Whether the engine ended by itself."""

    def entries(self, crashed_at: int | None) -> list[Marker]:
        found: list[Marker] = []
        last: EventRow | None = None
        for event in self._events:
            if isinstance(event.payload, AttemptEvent):
                died = engine_died_before(event.payload, self._attempts)
                if died and last is not None:
                    found.append(self._death(last, event.step))
                found.append(self._attempt(event, event.payload, died=died))
                self._error, self._ended = "", False
            elif (marker := self._entry(event)) is not None:
                found.append(marker)
            last = event
        if crashed_at is not None and last is not None:
            found.append(self._death(last, crashed_at))
        return self._with_older_commands(found)

    # -- attempts and their ends ---------------------------------------------------------------

    def _death(self, last: EventRow, at_least: int) -> Marker:
        """The entry for an engine that was killed at some time after its last event."""
        step = max(last.step, self._reached.get(last.attempt, at_least))
        return Marker(
            step, "crash", DIED, time=last.time, key=f"died-{last.attempt}", after=last.event
        )

    def _attempt(self, event: EventRow, payload: AttemptEvent, *, died: bool) -> Marker:
        step = payload.from_step
        if (fork := payload.fork) is not None:
            text = f"forked from {fork.source} at step {fork.step}"
        elif payload.attempt == 1:
            text = "started"
        elif payload.attempt - 1 in self._rolled_back:
            text = f"continues from step {step}"
        else:
            same_engine = not (self._ended or died)
            verb = "restarted" if self._error and same_engine else "resumed"
            text = f"{verb} from step {step}"
        return _marker(event, "attempt", text, step=step)

    # -- all other events ----------------------------------------------------------------------

    def _entry(self, event: EventRow) -> Marker | None:
        left = self._left(event.attempt, event.step)
        found: Marker | None = None
        match event.payload:
            case CheckpointEvent(score=score, kl=kl):
                text = f"checkpoint, score {number(score)}, KL {number(kl, 2)}"
                found = _marker(event, "checkpoint", text, abandoned=left)
            case AlertEvent() as alert if not self._repeats_error(alert):
                text = short_alert(alert)
                if not text.startswith(alert.rule):
                    text = f"{alert.rule}: {text}"
                found = _marker(event, "alert", text, abandoned=left)
            case ReferenceEvent(mix=mix):
                text = f"reference: {mix:.0%} policy"
                found = _marker(event, "command", text, "schedule", abandoned=left)
            case ReadyEvent(notes=[_, *_] as notes):
                found = _marker(event, "attempt", "; ".join(notes))
            case NoteEvent(text=text, who=who):
                found = _marker(event, "note", text, who, abandoned=left)
            case ErrorEvent(text=text):
                self._error = text
                found = _marker(event, "crash", text)
            case StateEvent(state=state, text=text) if state in ENDED_STATES:
                self._ended = True
                if state != "failed" or not self._error:  # an error has an entry already
                    said = text.startswith(state)  # "stopped at once, nothing was saved"
                    words = [text] if said else [state, text]
                    found = _marker(event, "end", ": ".join(filter(None, words)))
            case CommandEvent(id=command_id):
                command = self._commands.pop(command_id, event.command)
                if command is not None:
                    found = self._command(command, f"e{event.event}", event.event)
        return found

    def _repeats_error(self, alert: AlertEvent) -> bool:
        return alert.rule == RESTART and bool(self._error) and alert.text.startswith(self._error)

    def _left(self, attempt: int, step: int) -> bool:
        """Whether a later attempt began before a step of this one."""
        if attempt not in self._kept:
            later = (a.from_step for a in self._attempts.values() if a.attempt > attempt)
            self._kept[attempt] = min(later, default=None)
        kept = self._kept[attempt]
        return kept is not None and kept < step

    def _command(self, command: CommandRow, key: str, event: int = 0) -> Marker | None:
        if not _shown(command):
            return None
        if command.command == Rollback.name():
            # It ends its own attempt; only another one can abandon where it led to.
            step = int(command.args.get("step") or 0)
            abandoned = self._left(command.attempt + 1, step)
        else:
            step = command.applied_step or 0
            repeated = bool(command.changes)  # when the run is resumed
            left = self._left(command.attempt, step - 1)
            abandoned = not command.live or (left and not repeated)
            if command.command in EFFECTS_ON_STEP_BEFORE:
                step -= 1
        when = command.ended or command.queued
        text = command_text(command)
        return Marker(step, "command", text, command.who, when, key, abandoned, after=event)

    def _with_older_commands(self, found: list[Marker]) -> list[Marker]:
        """Inserts commands whose events were not read, by the time of their arrival."""
        older = [(c, self._command(c, f"c{c.id}")) for c in self._commands.values()]
        for command, marker in older:
            if marker is not None:
                at = bisect.bisect(found, command.queued, key=lambda m: m.time)
                found.insert(at, marker)
        return found


def _shown(command: CommandRow) -> bool:
    """Whether a command has an entry; one of a newer version does."""
    kind = COMMANDS.get(command.command)
    return (
        command.status == "applied"
        and command.applied_step is not None
        and (kind is None or kind.on_charts)
    )


def _marker(
    event: EventRow,
    kind: str,
    text: str,
    who: str = "",
    *,
    step: int | None = None,
    abandoned: bool = False,
) -> Marker:
    at = event.step if step is None else step
    key = f"e{event.event}"
    return Marker(at, kind, text, who, event.time, key, abandoned, event, event.event)


def pause_reason(
    state: str, events: Iterable[EventRow], commands: Iterable[CommandRow]
) -> str | None:
    """Returns `kl_runs_away at step 4: KL 7.26 > 6`; None if a person paused, or nobody.

    For engines that do not record the reason themselves.

    Args:
        state: of the session.
        events: oldest first.
        commands: in order of arrival.
    """
    if state not in PAUSED_STATES:
        return None
    holds = (Pause.name(), Unpause.name())
    done = [c for c in commands if c.command in holds and c.status in ("accepted", "applied")]
    if not done or done[-1].command != Pause.name() or not done[-1].who.startswith(GUARD_RAIL):
        return None
    rule = done[-1].who.removeprefix(GUARD_RAIL)
    for event in reversed(list(events)):
        alert = event.payload
        if isinstance(alert, AlertEvent) and alert.rule == rule and alert.action == "pause":
            return f"{rule} at step {event.step}: {short_alert(alert)}"
    return rule


def short_alert(alert: AlertEvent) -> str:
    """An alert in a few words: `KL 7.26 > 6`; its whole text if it has no short one."""
    if not alert.brief:
        return short_condition(alert.text.removeprefix("look here: "))
    return f"{alert.brief} (alert {alert.count})" if alert.count > 1 else alert.brief


@functools.lru_cache(maxsize=8192)  # the timeline is made again with each new event
def short_condition(text: str) -> str:
    """Shortens `objective/kl is 7.26, above 6` to `KL 7.26 > 6`; other texts stay as they are.

    For alerts of earlier versions, which recorded no brief text. A prediction becomes `KL 4.9, in
    10 steps 7.1 > 6`. A repeated alert of the same rule becomes `KL 7.26 > 6 (alert 2)`.
    """
    if found := _BOUND.fullmatch(text):
        sign = ">" if found["side"] == "above" else "<"
        short = f"{found['value']} {sign} {found['bound']}"
    elif found := _PREDICTED.fullmatch(text):
        short = (
            f"{found['value']}, in {found['ahead']} steps {found['predicted']} > {found['bound']}"
        )
    else:
        return text
    again = f" ({found['again']})" if found["again"] else ""
    return f"{title_of(found['metric'])} {short}{again}"
