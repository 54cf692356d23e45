"""Everything that a session recorded, in the order it happened, for a replay."""

import itertools
import statistics
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import sub

from engine.errors import ConfigError
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.session.folder import SessionFolder
from engine.session.position import AttemptStart, Position, step_ranges

STEPS = "SELECT attempt, step, time FROM steps ORDER BY step"
PAST_STEPS = "SELECT attempt, step, time FROM steps_past ORDER BY attempt, step"
EVENTS = """
SELECT id, attempt, time, step, kind IN ('alert', 'checkpoint', 'reference') FROM events ORDER BY id
"""
ATTEMPTS = "SELECT attempt, from_step FROM attempts ORDER BY attempt"
MAX_GAP = 10
"""In steps of the usual length. A longer gap without anything recorded is shortened to this."""
MIN_GAP = 1.0
"""Seconds; no gap is shortened below this."""
STEPS_MEASURED = 1000
"""Number of steps from which the usual length of a step is taken."""

Step = tuple[int, int, float]
"""Attempt, number and wall clock."""
Event = tuple[int, int, float, int, bool]
"""Id, attempt, wall clock, step, and whether that is the step the event is about. Otherwise it is
the last finished step."""


class Recording:
    """The items of a session, each a step or an event, and when a replay reaches them.

    A replay's time, the *offset*, is 0 at the first item and leaves out long gaps: a run that was
    resumed the next morning continues after the time of some steps.
    """

    def __init__(self, session: SessionFolder) -> None:
        """Reads all items; two tenths of a second for 100,000 steps.

        Raises:
            JournalError: the journal cannot be read.
        """
        live = session.is_live()
        database = ReadOnlyDatabase(session.journal_file, schema.JOURNAL)
        try:
            with database.snapshot():
                starts: list[AttemptStart] = database.rows(ATTEMPTS)
                events: list[Event] = database.rows(EVENTS)
                steps: list[Step] = database.rows(STEPS)
                past: list[Step] = database.rows(PAST_STEPS)
        finally:
            database.close()
        self._starts = starts
        self._keep_last = _keep_last(session)
        self._live = live
        """Whether an engine ran when this was read."""
        self.last_step = steps[-1][1] if steps else 0
        """The last step of today's timeline."""
        self._attempts = array("q")
        self._steps = array("q")
        self._events = array("q")
        self.times = array("d")
        """Wall clock of each item."""
        self._merge(sorted(past + steps) if past else steps, events)
        self.offsets = array("d", _offsets(self.times, steps))
        """Seconds after the first item at which a replay reaches each."""

    def _merge(self, steps: Sequence[Step], events: Sequence[Event]) -> None:
        """Puts each event between the steps. Neither order of its own changes."""
        from_step = dict(self._starts)
        done, step, current = 0, 0, 0
        before = _steps_before(steps, events)
        for (event, attempt, time, _, _), until in zip(events, before, strict=True):
            self._add_steps(steps[done:until], self._events[-1] if self._events else 0)
            if attempt != current:
                step, current = from_step.get(attempt, 0), attempt
            if until > done and steps[until - 1][0] == attempt:
                step = steps[until - 1][1]
            done = until
            self._attempts.append(attempt)
            self._steps.append(step)
            self._events.append(event)
            self.times.append(time)
        self._add_steps(steps[done:], self._events[-1] if self._events else 0)

    def _add_steps(self, steps: Sequence[Step], event: int) -> None:
        if steps:
            attempts, numbers, times = zip(*steps, strict=True)
            self._attempts.extend(attempts)
            self._steps.extend(numbers)
            self._events.extend(itertools.repeat(event, len(steps)))
            self.times.extend(times)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def duration(self) -> float:
        """The offset of the last item."""
        return self.offsets[-1] if self.offsets else 0.0

    # -- lookups -------------------------------------------------------------------------------

    def index_at(self, offset: float) -> int:
        """The last item that a replay has reached at an offset."""
        return max(bisect_right(self.offsets, offset) - 1, 0)

    def time_at(self, offset: float) -> float:
        """The wall clock at an offset, between its item and the next one."""
        index = self.index_at(offset)
        passed = max(offset - self.offsets[index], 0.0)
        if index + 1 == len(self):
            return self.times[index]
        return max(self.times[index], min(self.times[index] + passed, self.times[index + 1]))

    def position_at(self, offset: float) -> Position:
        """The position of a replay at an offset."""
        index = self.index_at(offset)
        attempt, step = self._attempts[index], self._steps[index]
        last = index + 1 == len(self)
        kept, current, abandoned = step_ranges(self._starts, attempt, step)
        return Position(
            attempt=attempt,
            step=step,
            event=self._events[index],
            # A clock that was set back must not hide anything forever.
            time=max(self.times) if last else self.time_at(offset),
            live=self._live if last else self._attempts[index + 1] == attempt,
            kept=kept,
            current=current,
            abandoned=abandoned,
            keep_last=self._keep_last,
        )

    def offset_of_step(self, step: int) -> float:
        """The offset of the first item after a step of today's timeline; 0 for step 0."""
        attempt = self._attempt_of(step)
        begin, end = bisect_left(self._attempts, attempt), bisect_right(self._attempts, attempt)
        return self.offsets[min(bisect_left(self._steps, step, begin, end), len(self) - 1)]

    def offset_of_event(self, event: int, not_before: float) -> float:
        """The offset of an event, or of the first item after it that is not before a time."""
        index = min(bisect_left(self._events, event), len(self) - 1)
        attempt = self._attempts[index]
        while (
            self.times[index] < not_before
            and index + 1 < len(self)
            and self._attempts[index + 1] == attempt
        ):
            index += 1
        return self.offsets[index]

    def offset_of_time(self, time: float) -> float:
        """The offset of the first item that is not before a time; the last one if all are."""
        index = next((i for i, t in enumerate(self.times) if t >= time), len(self) - 1)
        return self.offsets[index]

    def offset_of_end(self, attempt: int) -> float:
        """The offset of the last item of an attempt."""
        return self.offsets[max(bisect_right(self._attempts, attempt) - 1, 0)]

    def next_step(self, offset: float) -> tuple[int, float, float] | None:
        """The step in progress at an offset: its number, and when it begins and ends.

        None between two attempts and at the end.
        """
        index = self.index_at(offset)
        attempt, step = self._attempts[index], self._steps[index]
        end = bisect_right(self._attempts, attempt)
        following = bisect_right(self._steps, step, index, end)
        if following == end:
            return None
        begin = bisect_left(self._steps, step, bisect_left(self._attempts, attempt), index + 1)
        return self._steps[following], self.times[begin], self.times[following]

    def _attempt_of(self, step: int) -> int:
        """The attempt that trained a step of today's timeline."""
        found = 1
        for number, from_step in self._starts:
            if from_step < step or number == 1:
                found = number
        return found


def _keep_last(session: SessionFolder) -> int:
    """`train.keep_last`; 1 if all checkpoints are kept, or if the configuration is damaged."""
    try:
        return max(session.config().train.keep_last, 1)
    except ConfigError:
        return 1


def _steps_before(steps: Sequence[Step], events: Sequence[Event]) -> list[int]:
    """The number of steps before each event, whatever the wall clock was set to.

    Most events are recorded with the last finished step. Events recorded with the step that they
    are about are placed between those by time: an alert may be about the step before it or after
    it, and a checkpoint is complete some steps after its own.
    """
    numbers = [(attempt, step) for attempt, step, _ in steps]
    least = [
        bisect_right(numbers, (attempt, step - 1 if about else step))
        for _, attempt, _, step, about in events
    ]
    most, limit, later = list(least), 0, 0
    for i in reversed(range(len(events))):
        _, attempt, _, _, about = events[i]
        if attempt != later:  # the last event of its attempt
            limit, later = bisect_left(numbers, (attempt + 1, 0)), attempt
        limit = most[i] = limit if about else least[i]
    counts, done = [], 0
    for (_, _, time, _, _), lowest, highest in zip(events, least, most, strict=True):
        done = max(done, min(lowest, highest))
        while done < highest and steps[done][2] <= time:  # a step comes before its alert
            done += 1
        counts.append(done)
    return counts


def _offsets(times: Sequence[float], steps: Sequence[Step]) -> list[float]:
    if not times:
        return []
    measured = [time for _, _, time in steps[:STEPS_MEASURED]]
    lengths = [b - a for a, b in itertools.pairwise(measured) if b > a]
    usual = statistics.median(lengths) if lengths else MIN_GAP
    longest = max(MAX_GAP * usual, MIN_GAP)
    gaps = (min(max(gap, 0.0), longest) for gap in map(sub, times[1:], times))
    return list(itertools.accumulate(gaps, initial=0.0))
