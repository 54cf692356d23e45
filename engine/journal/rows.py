"""What a session's databases hold, one frozen struct a row.

Readers build them once, at the edge. Where a row is printed (`--json`) or exported, `as_json` gives
the object that stands there: its keys are a contract.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from engine.config.settings import SettingChange
from engine.journal.json_values import Json


class SessionMeta(Struct, frozen=True, kw_only=True):
    """What the supervisor keeps up to date."""

    state: str = "starting"
    total_steps: int = 0
    """0 while it is not known."""
    settings: dict[str, Any] | None = None
    """In force; None before the first ones. A mapping: another version has other settings."""
    message: str = ""
    """Why the session is in this state, where there is a why."""


class AttemptRow(Struct, frozen=True, kw_only=True):
    """One start of the engine."""

    attempt: int
    from_step: int
    """The checkpoint it goes on from, 0 for the start."""
    fresh: bool
    """Whether settings that were changed after that step are forgotten."""
    started: float
    ended: float | None
    """None while it runs, or where it was killed."""
    pid: int
    host: str
    version: str


class MetricRow(Struct, frozen=True, kw_only=True):
    """One step of the current timeline."""

    step: int
    attempt: int
    time: float
    values: dict[str, float | None]
    """Every metric of the session, None where undefined."""

    def as_json(self) -> Json:
        """The metrics beside step, attempt and time."""
        return {"step": self.step, "attempt": self.attempt, "time": self.time} | self.values


class CheckpointRow(Struct, frozen=True):
    """One checkpoint. Its fields are the columns, in their order."""

    step: int
    attempt: int
    time: float
    size: int
    """Bytes."""
    score: float | None
    kl: float | None
    status: str
    """written, complete, superseded, abandoned, replaced or removed."""


class CommandRow(Struct, frozen=True, kw_only=True):
    """One command and what became of it."""

    id: str
    command: str
    """Its name: `pause`, `beta`."""
    args: dict[str, Any]
    """A mapping: each command has its own, and another version has other commands."""
    who: str
    status: str
    """queued, accepted, applied or rejected."""
    queued: float
    accepted: float | None = None
    ended: float | None = None
    attempt: int
    applied_step: int | None = None
    """In force from this step on."""
    reason: str | None = None
    """Why it was rejected."""
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}
    """A mapping: only a probe has one, see :class:`ProbeResult`."""
    live: bool = True
    """Whether it still holds: not after a roll back to before it."""

    def as_json(self) -> Json:
        """All fields, and the first change's `old` and `new`."""
        first = self.changes[0] if self.changes else None
        return msgspec.structs.asdict(self) | {
            "changes": msgspec.to_builtins(self.changes),
            "live": int(self.live),
            "old": first.old if first else None,
            "new": first.new if first else None,
        }


# -- events ----------------------------------------------------------------------------------------


class StateEvent(Struct, frozen=True):
    """The session is in another state."""

    state: str = ""
    text: str = ""


class CommandEvent(Struct, frozen=True):
    """Somebody asked for something."""

    id: str = ""


class NoteEvent(Struct, frozen=True):
    """A line that an operator left."""

    text: str = ""
    who: str = ""


class AlertEvent(Struct, frozen=True):
    """Something deserves a look. The evidence differs from rule to rule and stays in the JSON."""

    rule: str = "alert"
    text: str = ""
    action: str = "notify"


class CheckpointEvent(Struct, frozen=True):
    """A checkpoint is complete."""

    size: int = 0
    """Bytes."""
    score: float | None = None
    kl: float | None = None


class AttemptEvent(Struct, frozen=True):
    """The engine was started."""

    attempt: int = 1
    from_step: int = 0
    fresh: bool = False


class ErrorEvent(Struct, frozen=True):
    """The run broke off."""

    text: str = ""
    traceback: str | None = None
    user_input: bool = False
    """Whether the user's input is to blame."""


class ReadyEvent(Struct, frozen=True):
    """The models are loaded. What was loaded depends on the run and stays in the JSON."""


Payload = (
    StateEvent
    | CommandEvent
    | NoteEvent
    | AlertEvent
    | CheckpointEvent
    | AttemptEvent
    | ErrorEvent
    | ReadyEvent
)

PAYLOADS: dict[str, type[Payload]] = {
    "state": StateEvent,
    "command": CommandEvent,
    "note": NoteEvent,
    "alert": AlertEvent,
    "checkpoint": CheckpointEvent,
    "attempt": AttemptEvent,
    "error": ErrorEvent,
    "ready": ReadyEvent,
}
"""By the event's kind."""

_DECODERS = {kind: msgspec.json.Decoder(payload) for kind, payload in PAYLOADS.items()}


def decode_payload(kind: str, data: str) -> Payload | None:
    """What this version knows of an event; None for a kind or a form of another version."""
    decoder = _DECODERS.get(kind)
    try:
        return decoder.decode(data) if decoder is not None else None
    except msgspec.DecodeError:
        return None


class EventRow(Struct, frozen=True, kw_only=True):
    """Something that happened."""

    event: int
    """Its number, increasing."""
    time: float
    attempt: int
    step: int
    kind: str
    payload: Payload | None
    """None for a kind or a form that this version does not know."""
    data: str = "{}"
    """The payload as the journal has it, JSON with every key that its writer put there."""
    command: CommandRow | None = None
    """Of a command's event, the command."""

    def as_json(self) -> Json:
        """The payload beside the other fields; a command's event with its whole life."""
        row: Json = {
            "event": self.event, "time": self.time, "attempt": self.attempt,
            "step": self.step, "kind": self.kind,
        }  # fmt: skip
        row |= json.loads(self.data)
        return row | self.command.as_json() if self.command is not None else row


# -- samples ---------------------------------------------------------------------------------------


class Judgement(Struct, frozen=True, kw_only=True):
    """What an operator thinks of a response: a label, a note, or both."""

    label: str | None = None
    """One of :data:`~engine.journal.labels.LABELS`."""
    note: str | None = None
    who: str
    time: float


class SampleRow(Struct, frozen=True, kw_only=True):
    """A response of the policy, with its judgement where it was asked for and there is one."""

    step: int
    index: int
    """In the step's global batch."""
    attempt: int
    prompt: str
    response: str
    score: float | None
    """None where it was not finite."""
    kl: float | None
    """Nats, over the whole response; None where it was not finite."""
    length: int
    """Tokens, end-of-sequence included."""
    ended: bool
    """By itself; False where it was cut off."""
    parts: dict[str, float | None] = {}
    """Each reward source's own score."""
    judgement: Judgement | None = None
    left: bool = False
    """Whether its timeline was left."""

    @property
    def label(self) -> str | None:
        """The judgement's label."""
        return self.judgement.label if self.judgement is not None else None

    @property
    def note(self) -> str | None:
        """The judgement's note."""
        return self.judgement.note if self.judgement is not None else None

    def as_json(self) -> Json:
        """The sample beside its `label` and `note`."""
        row: Json = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name not in ("judgement", "left")
        }
        return row | {"label": self.label, "note": self.note}


class ProbeResponse(Struct, frozen=True, kw_only=True):
    """What one model answered to a probe."""

    response: str = ""
    score: float | None = None
    kl: float | None = None
    """Nats from the reference, over the whole response."""
    length: int = 0
    """Tokens."""
    step: int | None = None
    """The probe was answered after this step; None where that is not said."""


class ProbeResult(Struct, frozen=True, kw_only=True):
    """The result of a probe."""

    policy: ProbeResponse = ProbeResponse()
    reference: ProbeResponse = ProbeResponse()

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "ProbeResult":
        """From a command's result."""
        return msgspec.convert(result, cls)
