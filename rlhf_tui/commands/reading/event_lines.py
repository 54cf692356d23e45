"""The journal as a log for people: one line per event, in order of time.

`events --json` has every field; a line has what people ask for: when, at which step, who did what,
old → new, and from which step on.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct

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
    StateEvent,
    engine_died_before,
)
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import Tone
from rlhf_tui.state.timeline import DIED, command_text

STATE_TONES: dict[str, Tone] = {
    "running": "good", "finished": "good", "pausing": "warn", "paused": "warn",
    "stopping": "warn", "failed": "bad", "crashed": "bad", "unreadable": "bad",
}  # fmt: skip
"""Tone of a state's word; others have none."""

MAX_REASON = 80
"""Characters of the reason of a pause."""


class EventLine(Struct, frozen=True):
    """One line of the log."""

    time: float | None
    """None if it is unknown, as of a crash."""
    step: int
    kind: str
    text: str
    tone: Tone = ""

    @property
    def columns(self) -> str:
        """The line in columns."""
        time = fmt.clock(self.time) if self.time is not None else f"{'–':<19}"
        return f"{time}  step {self.step:<6} {self.kind:<10} {self.text}".rstrip()


def event_lines(
    rows: Sequence[EventRow], attempts: Sequence[AttemptRow], *, crashed: bool
) -> Iterator[EventLine]:
    """Makes the lines of events.

    Args:
        rows: events in order.
        attempts: all attempts, to find the engines that died.
        crashed: whether the last engine died.
    """
    by_number = {attempt.attempt: attempt for attempt in attempts}
    step, error = 0, ""
    for row in rows:
        payload = row.payload
        if isinstance(payload, AttemptEvent) and engine_died_before(payload, by_number):
            yield _crash(step)
        yield _line(row, error)
        step = row.step
        error = payload.text if isinstance(payload, ErrorEvent) else error
    if crashed and rows:
        yield _crash(step)


def _crash(step: int) -> EventLine:
    return EventLine(None, step, "crash", DIED, "bad")


def _line(row: EventRow, error: str) -> EventLine:
    """The line of an event, without text that repeats the last error."""
    kind, text, tone = _describe(row)
    if error and kind in ("state", "restart"):
        text = text.replace(f"{error}: ", "", 1).removesuffix(f": {error}")
    return EventLine(row.time, row.step, kind, text, tone)


def _describe(row: EventRow) -> tuple[str, str, Tone]:  # noqa: PLR0911 - one short case a kind
    """Kind, text and tone of an event."""
    match row.payload:
        case StateEvent(state=state, text=text):
            return "state", _state(state, text), STATE_TONES.get(state, "")
        case CommandEvent() if row.command is not None:
            tone: Tone = "warn" if row.command.status == "rejected" else ""
            return "command", _command(row.command), tone
        case NoteEvent(text=text, who=who):
            return "note", f"{who}: {text}" if who else text, ""
        case AlertEvent(rule="restart", text=text):
            return "restart", text, "bad"
        case AlertEvent(rule=rule, text=text):
            return "alert", text if text.startswith(rule) else f"{rule}: {text}", "warn"
        case CheckpointEvent(size=size):
            return "checkpoint", f"saved, {fmt.size(size)}", ""
        case AttemptEvent():
            return "attempt", _attempt(row.payload), ""
        case ErrorEvent(text=text):
            return "error", text, "bad"
        case ReadyEvent(notes=notes) as ready:
            loaded = f"models and data are loaded{_placed(ready)}"
            return "ready", "; ".join([loaded, *notes]), ""
        case _:  # another version may write kinds that this one does not know
            return row.kind, row.data, ""


def _placed(ready: ReadyEvent) -> str:
    """Where the models are; "" in journals of earlier versions."""
    if not ready.device:
        return ""
    kind = "GPU" if ready.device.startswith("cuda") else "CPU"
    if ready.ranks == 1:
        return f" on {'a' if kind == 'GPU' else 'the'} {kind}"
    return f" by {ready.ranks} ranks on {kind}s, {ready.strategy}"


def _state(state: str, text: str) -> str:
    if not text:
        return state
    if state == "paused":  # the alert before it has the whole text
        return f"paused by {text[:MAX_REASON]}{'…' if len(text) > MAX_REASON else ''}"
    return f"{state}: {text}"


def _attempt(attempt: AttemptEvent) -> str:
    if attempt.fork is not None:
        return f"{attempt.attempt}: forked from step {attempt.fork.step} of {attempt.fork.source}"
    if not attempt.from_step:
        return f"{attempt.attempt}: starts from step 0"
    left = "; later steps are an abandoned branch" if attempt.fresh else ""
    return f"{attempt.attempt}: resumes from the checkpoint of step {attempt.from_step}{left}"


def _command(command: CommandRow) -> str:
    """`ana on pts/1: beta 0.05 → 0.08, applied at step 12`."""
    said = f"{command.who}: {command_text(command)}"
    match command.status:
        case "applied":
            return f"{said}, applied at step {command.applied_step}"
        case "rejected":
            return f"{said}, rejected: {command.reason}"
        case _:
            return f"{said}, applies at the next step boundary"
