"""A moment in the history of a session: readers show its files as they were then."""

from collections.abc import Sequence

from msgspec import Struct


class StepRange(Struct, frozen=True):
    """A range of abandoned steps of one attempt: after one step, up to and including another."""

    attempt: int
    after: int
    until: int


class Position(Struct, frozen=True, kw_only=True):
    """A moment of a session. Readers show the steps and events up to it, not the later ones.

    Moments are ordered by attempt, step and event id, not by the wall clock, which may have been
    set back.
    """

    attempt: int
    """The attempt that ran, from 1; 0 before the first."""
    step: int
    """The last completed step of the timeline of that moment."""
    event: int
    """The id of the last event."""
    time: float
    """Wall clock, seconds since the epoch."""
    live: bool
    """Whether an engine ran."""
    kept: int
    """The last step of today's timeline that is shown. Later steps of that moment's timeline are
    in :attr:`current`."""
    current: tuple[StepRange, ...] = ()
    """Steps that belonged to the timeline then, and are on an abandoned branch today."""
    abandoned: tuple[StepRange, ...] = ()
    """Steps that were already on an abandoned branch."""
    keep_last: int = 1
    """After how many more saves a checkpoint that is removed today was removed, at the earliest."""


AttemptStart = tuple[int, int]
"""Number of an attempt, and the step of the checkpoint that it started from."""
NO_LIMIT = 2**62
"""Above every step."""


def step_ranges(
    starts: Sequence[AttemptStart], attempt: int, step: int
) -> tuple[int, tuple[StepRange, ...], tuple[StepRange, ...]]:
    """Returns `kept`, `current` and `abandoned` of a :class:`Position`.

    Args:
        starts: all attempts of the session, in order.
        attempt: the one that runs at the position.
        step: the last completed step of that attempt.
    """
    current, abandoned = [], []
    today, then = _cuts(starts), _cuts([s for s in starts if s[0] <= attempt])
    kept = min(step, today.get(attempt, NO_LIMIT))
    for number, left_then in then.items():
        reached = step if number == attempt else NO_LIMIT
        if today[number] < min(left_then, reached):
            current.append(StepRange(number, today[number], min(left_then, reached)))
        if left_then < reached:
            abandoned.append(StepRange(number, left_then, reached))
    return kept, tuple(current), tuple(abandoned)


def _cuts(starts: Sequence[AttemptStart]) -> dict[int, int]:
    """Attempt → the last of its steps that later attempts among these have kept.

    An attempt from step 0 repeats the evaluation before the first step, so it does not keep even
    that.
    """
    cuts, cut = {}, NO_LIMIT
    for number, from_step in reversed(starts):
        cuts[number] = cut
        cut = min(cut, from_step or -1)
    return dict(reversed(cuts.items()))
