"""The states of a session and the transitions between them."""

from typing import Literal, get_args

State = Literal[
    "starting", "running", "pausing", "paused", "stopping", "finished", "stopped", "failed"
]

TRANSITIONS: dict[State, frozenset[State]] = {
    # Restarted ranks return to the state before their death: paused, pausing or stopping.
    "starting": frozenset({"running", "pausing", "paused", "stopping", "stopped", "failed"}),
    "running": frozenset(
        {"starting", "pausing", "paused", "stopping", "finished", "stopped", "failed"}
    ),
    "pausing": frozenset(
        {"starting", "running", "paused", "stopping", "finished", "stopped", "failed"}
    ),
    # A pause that would end by itself is turned into one that does not: pausing.
    "paused": frozenset({"starting", "running", "pausing", "stopping", "stopped", "failed"}),
    "stopping": frozenset({"starting", "finished", "stopped", "failed"}),
    "finished": frozenset(),
    "stopped": frozenset(),
    "failed": frozenset(),
}
"""State → states that can follow it during the life of an engine. A restart of the ranks leads
from a live state to `starting`; the next engine of a session also begins at `starting`."""

STATES: tuple[State, ...] = get_args(State)
ENDED_STATES: tuple[State, ...] = tuple(s for s in STATES if not TRANSITIONS[s])
LIVE_STATES: tuple[State, ...] = tuple(s for s in STATES if TRANSITIONS[s])


def is_legal(before: State | None, after: State) -> bool:
    """Whether `after` can follow `before`, which is None for a new engine."""
    return after in (TRANSITIONS[before] if before is not None else ("starting",))
