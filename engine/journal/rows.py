"""The rows of a session's databases, as frozen structs.

Readers build them from the tuples of SQLite. `as_json` returns the object that `--json` and exports
print; its keys are a contract.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from engine.config.settings import SettingChange
from engine.examined import examined
from engine.journal.json_values import Json, decoded
from engine.journal.turns import Turn, turns_of
from engine.metrics import CONTRACT
from engine.protocol.rank_messages import SampleMessages


class SessionMeta(Struct, frozen=True, kw_only=True):
    """The current state and settings of a session."""

    state: str = "starting"
    total_steps: int = 0
    """0 while unknown."""
    settings: dict[str, Any] | None = None
    """Settings in effect, None before the first step. A mapping, because versions have different
    settings."""
    message: str = ""
    """The reason for the state, such as an error; may be empty."""
    pause_reason: str | None = None
    """What paused the run; None if a person did, or if it is not paused."""
    deadline: float | None = None
    """Unix time before which the run saves and ends; None without one."""
    exit_code: int | None = None
    """Exit code of the last engine; None while one lives, or if it was killed."""
    best_metric: str | None = None
    """`train.best_metric`; None in a session whose last engine was of an earlier version."""


class AttemptRow(Struct, frozen=True, kw_only=True):
    """One attempt: a start of the ranks."""

    attempt: int
    from_step: int
    """Step of the checkpoint that it started from, 0 for none."""
    fresh: bool
    """Whether settings changed after that step are discarded instead of repeated."""
    started: float
    ended: float | None
    """When its engine ended; None if the engine lives, was killed, or began another attempt."""
    pid: int
    host: str
    version: str


class ForkOrigin(Struct, frozen=True):
    """Where a fork began. The fields are the columns, in order."""

    attempt: int
    """The first attempt of the fork; earlier ones were copied."""
    session: str
    """The name of the session it was forked from."""
    step: int
    """The step of the checkpoint."""


class MetricRow(Struct, frozen=True, kw_only=True):
    """One step of the current timeline."""

    step: int
    attempt: int
    time: float | None
    """When it ended; None for step 0, the evaluation before the first."""
    values: dict[str, float | None]
    """Value of every metric of the session, None where undefined."""

    def as_json(self) -> Json:
        """Step, attempt and time, and each metric under its name, including all of `CONTRACT`."""
        row = {"step": self.step, "attempt": self.attempt, "time": self.time} | self.values
        return row | {name: None for name in CONTRACT if name not in row}


CHECKPOINT_STATUSES = ("written", "complete", "superseded", "abandoned", "replaced", "removed")


class CheckpointRow(Struct, frozen=True):
    """One checkpoint. The fields are the columns, in order."""

    step: int
    attempt: int
    time: float
    size: int
    """Bytes."""
    score: float | None
    kl: float | None
    status: str
    """One of :data:`CHECKPOINT_STATUSES`."""
    kept: bool = False
    """Whether an operator saved it, so that it stays until somebody deletes it."""


class CommandRow(Struct, frozen=True, kw_only=True):
    """One command and its status."""

    id: str
    command: str
    """Name of the command, such as `pause` or `beta`."""
    args: dict[str, Any]
    """A mapping, because each command has different arguments and versions have other commands."""
    who: str
    status: str
    """queued, accepted, applied or rejected."""
    queued: float
    accepted: float | None = None
    ended: float | None = None
    attempt: int
    applied_step: int | None = None
    """First step with the command in effect."""
    reason: str | None = None
    """Reason of a rejection."""
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}
    """Result of a probe, see :class:`ProbeResult`; empty for other commands."""
    live: bool = True
    """False if the command is no longer in effect, as after a rollback to an earlier step."""

    def as_json(self) -> Json:
        """All fields, and `old` and `new` of the first change."""
        first = self.changes[0] if self.changes else None
        return msgspec.structs.asdict(self) | {
            "changes": msgspec.to_builtins(self.changes),
            "live": int(self.live),
            "old": first.old if first else None,
            "new": first.new if first else None,
        }


# -- events ----------------------------------------------------------------------------------------


class StateEvent(Struct, frozen=True):
    """The state of the session changed."""

    state: str = ""
    text: str = ""


class CommandEvent(Struct, frozen=True):
    """A command arrived."""

    id: str = ""


class NoteEvent(Struct, frozen=True):
    """An operator added a note."""

    text: str = ""
    who: str = ""


class AlertEvent(Struct, frozen=True):
    """An alert. Further keys of the JSON depend on the rule."""

    rule: str = "alert"
    text: str = ""
    action: str = "notify"
    brief: str = ""
    """A shorter text: `KL 7.26 > 6`. Empty if there is none, or from an earlier version."""
    count: int = 0
    """Number of the alert among those of its rule in the run, from 1; 0 if no rule raised it."""


class CheckpointEvent(Struct, frozen=True):
    """A checkpoint is complete."""

    size: int = 0
    """Bytes."""
    score: float | None = None
    kl: float | None = None


class ForkedFrom(Struct, frozen=True, rename={"source": "from"}):
    """The session and the step that a session was forked from."""

    source: str = ""
    step: int = 0


class AttemptEvent(Struct, frozen=True):
    """An attempt started."""

    attempt: int = 1
    from_step: int = 0
    fresh: bool = False
    fork: ForkedFrom | None = None
    new_engine: bool | None = None
    """Whether it is its engine's first attempt; None in sessions of earlier versions."""
    total_steps: int = 0
    """`train.steps`, which a resume can change; 0 in sessions of earlier versions."""


def engine_died_before(begun: AttemptEvent, attempts: Mapping[int, AttemptRow]) -> bool:
    """Whether the previous attempt's engine died: it recorded no end, and another engine followed.

    Args:
        begun: the attempt that followed.
        attempts: all attempts, by number.
    """
    if begun.fork is not None:  # the attempts before are its parent's, whose engine may live
        return False
    last, next_ = attempts.get(begun.attempt - 1), attempts.get(begun.attempt)
    if last is None or next_ is None or last.ended is not None:
        return False
    if begun.new_engine is not None:
        return begun.new_engine
    # After a restart of a container, another process may have the same ids.
    return (last.pid, last.host) != (next_.pid, next_.host)


class ErrorEvent(Struct, frozen=True):
    """The run failed."""

    text: str = ""
    traceback: str | None = None


class ReadyEvent(Struct, frozen=True):
    """Models and data are loaded. Further keys of the JSON depend on the run."""

    notes: list[str] = []
    """Settings that are allowed but seldom intended; in the first attempt only."""
    device: str = ""
    """Rank 0's: `cpu`, or `cuda` with or without an index. Earlier versions may lack it."""
    ranks: int = 1
    strategy: str = ""
    """`ddp` or `fsdp`."""


class ReferenceEvent(Struct, frozen=True):
    """The reference was updated before a step."""

    mix: float = 1.0
    """Share of the policy in the update."""


Payload = (
    StateEvent
    | CommandEvent
    | NoteEvent
    | AlertEvent
    | CheckpointEvent
    | AttemptEvent
    | ErrorEvent
    | ReadyEvent
    | ReferenceEvent
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
    "reference": ReferenceEvent,
}
"""Kind of an event → its payload."""

_DECODERS = {kind: msgspec.json.Decoder(examined(payload)) for kind, payload in PAYLOADS.items()}


def decode_payload(kind: str, data: str) -> Payload | None:
    """Decodes the payload of an event; None if its kind or its fields are unknown."""
    decoder = _DECODERS.get(kind)
    try:
        return decoder.decode(data) if decoder is not None else None
    except (msgspec.DecodeError, RecursionError):
        return None


class EventRow(Struct, frozen=True, kw_only=True):
    """One event."""

    event: int
    """Id, in increasing order."""
    time: float
    attempt: int
    step: int
    kind: str
    payload: Payload | None
    """None if this version does not know the kind or the fields."""
    data: str = "{}"
    """The payload in JSON, with all keys."""
    command: CommandRow | None = None
    """The command of a command's event."""

    def as_json(self) -> Json:
        """The fields, the keys of the payload and, for a command's event, those of the command."""
        row: Json = {
            "event": self.event, "time": self.time, "attempt": self.attempt,
            "step": self.step, "kind": self.kind,
        }  # fmt: skip
        row |= decoded(self.data, dict[str, Any])
        return row | self.command.as_json() if self.command is not None else row


# -- samples ---------------------------------------------------------------------------------------


class Judgement(Struct, frozen=True, kw_only=True):
    """An operator's judgement of a response: a label, a note, or both."""

    label: str | None = None
    """One of :data:`~engine.journal.judgements.labels.LABELS`."""
    note: str | None = None
    who: str
    time: float


class SampleRow(Struct, frozen=True, kw_only=True):
    """One response of the policy."""

    step: int
    index: int
    """Index in the step's global batch."""
    attempt: int
    prompt: str
    response: str
    score: float | None
    """None if it was not finite."""
    kl: float | None
    """Nats, summed over the response; None if it was not finite."""
    length: int
    """Tokens, including the end-of-sequence token."""
    ended: bool
    """False if the response was truncated."""
    parts: dict[str, float | None] = {}
    """Score of each reward source."""
    turn_scores: dict[str, list[float]] = {}
    """Scores of the policy's turns by the reward sources that gave them."""
    weights_version: int | None = None
    """The step whose update produced the weights that sampled it; None if unknown, as in sessions
    of earlier versions."""
    replies: list[tuple[int, int]] | None = None
    """Start and end of each reply of the environment in the response, in characters; None without
    an environment, and in sessions of earlier versions."""
    messages: SampleMessages | None = None
    """Set for conversations with an environment; None for responses to held-out prompts, and in
    sessions of earlier versions."""
    judgement: Judgement | None = None
    """None if there is no judgement, or if it was not read."""
    left: bool = False
    """Whether the sample belongs to an abandoned branch."""
    held_out: bool = False
    """Whether it is a response to a held-out prompt. It can have the attempt, step and index of a
    training response, so it has no judgement."""

    @property
    def turns(self) -> list[Turn]:
        """The response in parts: the policy's turns and the replies between them."""
        return turns_of(self.response, self.replies)

    @property
    def label(self) -> str | None:
        """Label of the judgement."""
        return self.judgement.label if self.judgement is not None else None

    @property
    def note(self) -> str | None:
        """Note of the judgement."""
        return self.judgement.note if self.judgement is not None else None

    def as_json(self) -> Json:
        """The fields of the sample, and `label` and `note`."""
        row: Json = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name not in ("messages", "judgement", "left", "held_out")
        }
        return row | {"label": self.label, "note": self.note}


class ProbeResponse(Struct, frozen=True, kw_only=True):
    """The response of one model to a probe."""

    response: str = ""
    score: float | None = None
    unscored: str = ""
    """Why there is no score; empty if there is one."""
    kl: float | None = None
    """KL to the reference in nats, summed over the response."""
    length: int = 0
    """Tokens."""
    replies: list[tuple[int, int]] | None = None
    """Start and end of each reply of the environment in the response, in characters; None without
    an environment."""
    messages: SampleMessages | None = None
    """Set for conversations with an environment."""
    step: int | None = None
    """The step of the probe, None if unknown."""

    @property
    def turns(self) -> list[Turn]:
        """The response in parts: the policy's turns and the replies between them."""
        return turns_of(self.response, self.replies)


class ProbeResult(Struct, frozen=True, kw_only=True):
    """The result of a probe."""

    policy: ProbeResponse = ProbeResponse()
    reference: ProbeResponse = ProbeResponse()

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "ProbeResult":
        """Converts the result of a command."""
        return msgspec.convert(result, examined(cls))
