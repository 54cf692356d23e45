"""What a reading of the journal found. No Textual here: it is used while that is imported."""

from dataclasses import dataclass, field
from typing import Any

from engine.journal.rows import AttemptRow, CheckpointRow, CommandRow, EventRow, SampleRow
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Phase

Points = list[tuple[int, float | None]]


@dataclass(frozen=True)
class SessionSummary:
    """A session in a few words."""

    state: str
    step: int
    total_steps: int
    settings: dict[str, Any]
    """In force. A mapping: a session of another version has other settings."""
    message: str
    attempts: list[AttemptRow]
    pid: int | None
    host: str | None


@dataclass(frozen=True)
class SessionUpdate:
    """What a reading found; a field that is None has not changed."""

    reset: bool = False
    """Forget everything: another timeline, or another journal."""
    head: SessionSummary | None = None
    curves: dict[str, Points] = field(default_factory=dict)
    """Points that follow those of earlier readings."""
    outlines: dict[str, Points] = field(default_factory=dict)
    """Of whole curves, lowest and highest values by turns: shown until the curve itself is read."""
    past: dict[str, list[tuple[int, int, float | None]]] = field(default_factory=dict)
    """(attempt, step, value) of timelines that were left."""
    names: list[str] | None = None
    events: list[EventRow] = field(default_factory=list)
    commands: list[CommandRow] | None = None
    checkpoints: list[CheckpointRow] | None = None
    samples: list[SampleRow] | None = None
    """The newest step's."""
    labels: tuple[int, ...] | None = None
    """Another value whenever somebody has judged an answer."""
    phases: list[Phase] | None = None
    telemetry: Telemetry | None = None
    connected: bool | None = None
    problem: str | None = None
    """What prevents reading; empty once it works again."""

    def __bool__(self) -> bool:
        return self != SessionUpdate()

    @property
    def only_live(self) -> bool:
        """Whether it speaks only of what goes on this moment: no curve and no list has changed."""
        return self == SessionUpdate(
            phases=self.phases, telemetry=self.telemetry, connected=self.connected
        )


REGULAR = ("checkpoint", "command")
"""Kinds of events that come all the time; commands are also told by themselves, all of them."""
REGULAR_KEPT, OTHERS_KEPT = 500, 5000


def thinned(events: list[EventRow]) -> list[EventRow]:
    """The newest of them: what comes all the time must not push out what stands on the curves.

    Args:
        events: oldest first.

    Returns:
        The newest 500 of :data:`REGULAR` kinds and the newest 5000 of others, oldest first.
    """
    if len(events) <= REGULAR_KEPT:
        return events
    left = {True: REGULAR_KEPT, False: OTHERS_KEPT}
    kept = []
    for event in reversed(events):
        regular = event.kind in REGULAR
        if left[regular]:
            left[regular] -= 1
            kept.append(event)
    return kept[::-1]
