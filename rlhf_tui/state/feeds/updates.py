"""The result of one reading of the journal. Does not import Textual, which loads meanwhile."""

from typing import Any

import msgspec
from msgspec import Struct

from engine.agreement import Agreement
from engine.journal.rows import AttemptRow, CheckpointRow, CommandRow, EventRow, SampleRow
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.file_signature import FileSignature
from engine.session.position import Position

Points = list[tuple[int, float | None]]


class SessionSummary(Struct, frozen=True):
    """The summary of a session."""

    state: str
    step: int
    total_steps: int
    settings: dict[str, Any]
    """Settings in force. A mapping, because a session of another version has other settings."""
    message: str
    attempts: list[AttemptRow]
    pid: int | None
    host: str | None
    pause_reason: str | None = None
    """What paused it; None if a person did, if it is not paused, or if that is not recorded."""
    deadline: float | None = None
    """Unix time before which the run saves and ends; None without one."""


class ReplayMark(Struct, frozen=True):
    """A marker of the timeline on the slider of a replay."""

    share: float
    """Its place in the replay, from 0 to 1."""
    kind: str
    """The kind of the marker."""


class ReplayStatus(Struct, frozen=True):
    """The position and speed of a replay."""

    position: Position
    share: float
    """Share of the replay that was played, from 0 to 1."""
    last_step: int
    """The last step of the recording."""
    speed: float
    """Seconds of the recording per second."""
    playing: bool
    marks: tuple[ReplayMark, ...] = ()
    """In order; also those that are still to come."""


class SessionUpdate(Struct, frozen=True):
    """The result of a reading; a field that is None has not changed."""

    reset: bool = False
    """Discard the state: the run was rolled back, or the journal was replaced."""
    head: SessionSummary | None = None
    curves: dict[str, Points] = msgspec.field(default_factory=dict)
    """Points to append to those of earlier readings."""
    downsampled: dict[str, Points] = msgspec.field(default_factory=dict)
    """Alternating minima and maxima of whole curves; shown until the curve is read."""
    past: dict[str, list[tuple[int, int, float | None]]] = msgspec.field(default_factory=dict)
    """(attempt, step, value) of abandoned branches."""
    names: list[str] | None = None
    events: list[EventRow] = msgspec.field(default_factory=list)
    commands: list[CommandRow] | None = None
    checkpoints: list[CheckpointRow] | None = None
    samples: list[SampleRow] | None = None
    """The newest step's."""
    labels: FileSignature | None = None
    """Changes whenever somebody labels a response."""
    agreement: Agreement | None = None
    """How far the scores agree with the judgements; computed again whenever `labels` changes."""
    phases: list[Phase] | None = None
    telemetry: Telemetry | None = None
    connected: bool | None = None
    refused: str | None = None
    """Why the engine takes no further viewer; empty if it does."""
    problem: str | None = None
    """Why the journal cannot be read; empty once it can be read again."""
    replay: ReplayStatus | None = None
    """The status of the replay that posts this; None for a session shown as it is now."""

    def __bool__(self) -> bool:
        return self != SessionUpdate()

    @property
    def only_live(self) -> bool:
        """Whether only phases, telemetry, connection and the place in a replay have changed."""
        return self == SessionUpdate(
            phases=self.phases, telemetry=self.telemetry, connected=self.connected,
            refused=self.refused, replay=self.replay,
        )  # fmt: skip


FREQUENT_EVENTS = ("checkpoint", "command", "reference")
"""Frequent kinds of events. All commands are also in :attr:`SessionUpdate.commands`."""
REGULAR_KEPT, OTHERS_KEPT = 500, 5000


def newest_events(events: list[EventRow]) -> list[EventRow]:
    """Returns the newest events; frequent kinds do not displace rare ones.

    Args:
        events: oldest first.

    Returns:
        The newest 500 of :data:`FREQUENT_EVENTS` kinds and the newest 5000 of others, oldest first.
    """
    if len(events) <= REGULAR_KEPT:
        return events
    left = {True: REGULAR_KEPT, False: OTHERS_KEPT}
    kept = []
    for event in reversed(events):
        regular = event.kind in FREQUENT_EVENTS
        if left[regular]:
            left[regular] -= 1
            kept.append(event)
    return kept[::-1]
