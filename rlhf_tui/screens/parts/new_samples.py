"""Counts the samples that a list of samples does not show yet."""

import functools

import msgspec
from textual.message import Message

from engine.journal.samples import SampleQuery, SampleReader
from engine.metrics import EVAL_SCORE
from engine.session.file_signature import FileSignature
from engine.session.folder import SessionFolder
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext

COUNT_GROUP = "count"
"""Group of the threads that count, see :meth:`SessionScreen.read_in_thread`."""


class CountOf(msgspec.Struct, frozen=True, kw_only=True):
    """All that the number of samples after a step depends on, except for the newest step."""

    session: str
    query: SampleQuery
    after: int
    attempts: int
    labels: FileSignature
    evaluations: int


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """A number of samples."""

    of: CountOf
    until: int
    """The last step that was counted."""
    number: int = 0


class NewCounted(Message):
    """The samples that the list does not show yet were counted."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted


class NewSamples:
    """The number of samples that were recorded since a list was read."""

    def __init__(self, screen: SessionScreen, context: AppContext) -> None:
        """For a screen of samples, which receives the messages; counts nothing yet."""
        self._screen = screen
        self._context = context
        self.list_read(0)

    def list_read(self, attempts: int) -> None:
        """Call this when the list was read, with the session's attempts at that time."""
        self.number = 0
        self._attempts = attempts
        self._counted: Counted | None = None
        self._asked: tuple[CountOf, int] | None = None
        """What was counted last, or is being counted, and the newest step."""

    def refresh(self, session: SessionFolder, query: SampleQuery, last_step: int) -> None:
        """Counts what is new.

        Args:
            session: the session.
            query: of the list.
            last_step: the newest step of the list.
        """
        step, of = self._context.state.head.step, self._counted_for(query, last_step)
        counted = self._counted
        if counted is None or counted.of != of:
            counted = Counted(of=of, until=of.after)
        if step <= counted.until:
            self._counted, self.number = counted, counted.number
        elif (of, step) != self._asked:
            # Only what is new: counting all of a long run may take longer than a step.
            read = functools.partial(_count, session, counted, step)
            if self._screen.read_in_thread(COUNT_GROUP, read, replaces=False):
                self._asked = of, step

    def take(self, message: NewCounted, query: SampleQuery, last_step: int) -> None:
        """Takes a number, unless the list was read again meanwhile; see :meth:`refresh`."""
        counted = message.counted
        if counted.of == self._counted_for(query, last_step):
            self._counted, self.number = counted, counted.number

    def _counted_for(self, query: SampleQuery, last_step: int) -> CountOf:
        state = self._context.state
        attempts = state.head.attempts
        # A later attempt has recorded the steps after its first checkpoint again.
        after = min([last_step, *(a.from_step for a in attempts[self._attempts :])])
        return CountOf(
            session=state.name,
            query=query,
            after=after,
            attempts=len(attempts),
            labels=state.labels if query.labels or query.judged is not None else (),
            # One that was made up for belongs to a step that may have been counted.
            evaluations=len(state.curves.series(EVAL_SCORE)) if query.held_out else 0,
        )


def _count(session: SessionFolder, counted: Counted, until: int) -> NewCounted:
    """Counts, in a worker thread."""
    with SampleReader(session) as samples:
        number = samples.count_after(counted.of.query, counted.until, until)
    return NewCounted(msgspec.structs.replace(counted, until=until, number=counted.number + number))
