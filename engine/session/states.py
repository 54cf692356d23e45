"""The states of a session, and which state may follow which."""

from typing import Literal, get_args

State = Literal[
    "starting", "running", "pausing", "paused", "stopping", "finished", "stopped", "failed"
]

TRANSITIONS: dict[State, frozenset[State]] = {
    # A run that was paused or stopping when its ranks died is so again once they are loaded.
    "starting": frozenset({"running", "pausing", "paused", "stopping", "stopped", "failed"}),
    "running": frozenset(
        {"starting", "pausing", "paused", "stopping", "finished", "stopped", "failed"}
    ),
    "pausing": frozenset(
        {"starting", "running", "paused", "stopping", "finished", "stopped", "failed"}
    ),
    "paused": frozenset({"starting", "running", "stopping", "stopped", "failed"}),
    "stopping": frozenset({"starting", "finished", "stopped", "failed"}),
    "finished": frozenset(),
    "stopped": frozenset(),
    "failed": frozenset(),
}
"""State → the states that may follow it while one engine lives; a live state → `starting` when the
ranks are started again. The next engine of the session begins at `starting` again."""

STATES: tuple[State, ...] = get_args(State)
ENDED_STATES: tuple[State, ...] = tuple(s for s in STATES if not TRANSITIONS[s])
LIVE_STATES: tuple[State, ...] = tuple(s for s in STATES if TRANSITIONS[s])


def is_legal(before: State | None, after: State) -> bool:
    """Whether `after` may follow `before`; None: the engine has only begun."""
    return after in (TRANSITIONS[before] if before is not None else ("starting",))
