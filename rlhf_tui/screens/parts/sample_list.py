"""A page of samples that does not change under its reader."""

import functools

import msgspec
from textual.binding import Binding, BindingType
from textual.message import Message

from engine.journal.judgements.labels import Key
from engine.journal.rows import SampleRow
from engine.journal.samples import SAMPLE_ORDERS, SampleQuery, SampleReader, with_judgements
from engine.metrics import EVAL_SCORE
from engine.session.file_signature import FileSignature
from engine.session.folder import SessionFolder
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.screens.parts.new_samples import NewCounted, NewSamples
from rlhf_tui.screens.parts.sample_filter import parse_filter
from rlhf_tui.widgets.samples.judgement import key_of

PAGE_SIZE = 500
PAGE_GROUP = "pages"
"""Group of the threads that read pages, see :meth:`SessionScreen.read_in_thread`."""
ORDER_TITLES = {"step": "step", "score": "score", "kl": "KL", "length": "len"}
BINDINGS: list[BindingType] = [
    Binding("full_stop,greater_than_sign", "page(1)", "next page", show=False),
    Binding("comma,less_than_sign", "page(-1)", "previous page", show=False),
    Binding("s", "sort", "sort"),
    Binding("r", "reverse", "reverse"),
    Binding("F", "show_new", "show new responses", show=False),
    Binding("equals_sign", "same_prompt", "responses to this prompt", show=False),
]
"""Keys of the screen whose actions call :class:`SampleList`."""


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to read a page."""

    query: SampleQuery
    page: int
    last_step: int | None
    """No samples of later steps; None: the newest step of the run."""
    attempts: int
    """Attempts of the session when it was requested."""
    asked: bool
    """Whether the reader asked for it; otherwise the run went on."""


class PageRead(Message):
    """A page of samples was read."""

    def __init__(self, request: PageRequest, rows: list[SampleRow], last_step: int) -> None:
        super().__init__()
        self.request, self.rows, self.last_step = request, rows, last_step


class JudgementsRead(Message):
    """The rows of a page were read again with their current judgements."""

    def __init__(self, query: SampleQuery, rows: list[SampleRow]) -> None:
        super().__init__()
        self.query, self.rows = query, rows


class SampleList:
    """Decides which samples are listed, and when the list changes.

    It follows a live run if it is sorted by step, newest first, until :meth:`freeze`. A frozen list
    changes only when its reader presses a key; samples recorded meanwhile are counted in
    :attr:`new`.
    """

    def __init__(self, screen: SessionScreen, context: AppContext) -> None:
        """For a screen of samples, which receives the messages; reads nothing yet."""
        self._screen = screen
        self._context = context
        self.new = NewSamples(screen, context)
        """The matching responses that were recorded since the list was read."""
        self.query = SampleQuery()
        self.filter = ""
        """The filter as it was typed."""
        self.page = 0
        self.session_changed()

    def session_changed(self) -> None:
        """Another session was opened: drops the rows, keeps order and filter."""
        self.rows: dict[Key, SampleRow] = {}
        self.frozen = False
        self.arrived = False
        """Whether the selected response came with a new step, after the reader's last key."""
        self.new.list_read(0)
        self.page = 0
        self.query = msgspec.structs.replace(self.query, prompt=None, held_out=False)
        self._last_step: int | None = None
        """The newest step of the list; None: of the run."""
        self._asked = True
        """Whether the reader waits for a page."""
        self._wanted: tuple[object, ...] = ()
        self._labels: FileSignature | None = None
        """The value of `state.labels` for which the rows were read; None: read them again."""
        self._before: tuple[SampleQuery, str, int, int | None, Key] | None = None
        """What :meth:`same_prompt` returns to: query, filter, page, newest step, response."""
        self.select: Key | None = None
        """The response to select in the page that is being read; None: the selected one."""

    @property
    def live(self) -> bool:
        """Whether the next step's responses come first: an order that can be followed."""
        return self.page == 0 and self.query.order == "step" and self.query.descending

    @property
    def following(self) -> bool:
        """Whether new responses appear in the list automatically."""
        return self.live and not self.frozen

    # -- freezing ------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Keeps the list as it is from now on; call it for each key of somebody who is reading.

        An empty list has no reader.
        """
        self.frozen = bool(self.rows)
        self.arrived = False

    def freeze_to_judge(self) -> bool:
        """Freezes before a judgement; False if the response may not have been read.

        A response that appeared by itself may have replaced the one that the reader wants to judge.
        """
        unread = self.arrived
        self.freeze()
        if unread:
            self._context.say("a new response has just moved here; press again to judge it")
        return not unread

    def show_new(self) -> None:
        """Shows new responses. In an order that can be followed, follows the run again."""
        self.page, self._last_step = 0, None
        self.frozen = self.frozen and not self.live
        self._ask()

    # -- what is asked for ---------------------------------------------------------------------

    def sort(self) -> None:
        """Sorts by the next column."""
        at = (SAMPLE_ORDERS.index(self.query.order) + 1) % len(SAMPLE_ORDERS)
        self._change(msgspec.structs.replace(self.query, order=SAMPLE_ORDERS[at]))

    def sort_by(self, order: str) -> None:
        """Sorts by a column; by the same one again reverses the order."""
        if order == self.query.order:
            self.reverse()
        else:
            self._change(msgspec.structs.replace(self.query, order=order))

    def reverse(self) -> None:
        """Reverses the order."""
        descending = not self.query.descending
        self._change(msgspec.structs.replace(self.query, descending=descending))

    def set_filter(self, text: str) -> None:
        """Filters by what was typed."""
        self.filter = text
        self._change(parse_filter(text, self.query))

    def turn_page(self, by: int) -> None:
        """Turns pages. All pages end with the same step, so they do not shift during a live run."""
        if by > 0 and len(self.rows) < PAGE_SIZE:
            self._context.say("this is the last page")
            return
        self.freeze()
        self.page = max(self.page + by, 0)
        self._ask()

    def same_prompt(self, selected: SampleRow | None) -> None:
        """Lists all responses to one prompt, the oldest first; again: what was listed before."""
        if self.query.prompt is not None:
            self.leave_prompt()
        elif selected is not None:
            self.freeze()
            last_step, key = self._last_step, key_of(selected)
            self._before = self.query, self.filter, self.page, last_step, key
            self.filter = ""
            self._change(
                SampleQuery(
                    prompt=selected.prompt, order="step", descending=False,
                    held_out=selected.held_out,
                )
            )  # fmt: skip

    def switch(self) -> None:
        """Lists the responses to held-out prompts, or again those of training."""
        self._before = None
        self.frozen = self.arrived = False
        self.rows = {}  # a response of training may have the key of a held-out one
        held_out = not self.query.held_out
        self._change(msgspec.structs.replace(self.query, prompt=None, held_out=held_out))

    def leave_prompt(self) -> None:
        """Returns from :meth:`same_prompt`, if it was called."""
        if self._before is not None:
            self.query, self.filter, self.page, self._last_step, self.select = self._before
            self._before = None
            self._ask()

    def _change(self, query: SampleQuery) -> None:
        self.query, self.page, self._last_step = query, 0, None
        self._ask()

    def _ask(self) -> None:
        self._asked = True
        self._wanted = ()
        self.refresh()

    # -- reading -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Reads what may have changed; call it whenever the state of the session has."""
        session, state = self._context.session, self._context.state
        if session is None:
            return
        if self.frozen and not self._asked:
            self._read_judgements(session)
        else:
            step = state.head.step if self.live else -1
            attempts = len(state.head.attempts)  # a roll back changes every page
            # The evaluation before the first step does not change the step.
            evaluations = len(state.curves.series(EVAL_SCORE)) if self.query.held_out else 0
            asked = (state.name, attempts, state.labels, self.query, self.page)
            wanted = (*asked, step, evaluations)
            if wanted != self._wanted:
                request = PageRequest(
                    query=self.query, page=self.page, attempts=attempts, asked=self._asked,
                    last_step=self._last_step if self._asked else None,
                )  # fmt: skip
                read = functools.partial(_read_page, session, request)
                # A search through a long run may take longer than its steps.
                replaces = asked != self._wanted[: len(asked)]
                if self._screen.read_in_thread(PAGE_GROUP, read, replaces=replaces):
                    self._wanted, self._labels = wanted, state.labels
        if not self.following and self._last_step is not None:
            self.new.refresh(session, self.query, self._last_step)

    def read_again(self) -> None:
        """Reads again after a judgement was written: the page, or judgements of a frozen one."""
        self._labels, self._wanted = None, ()
        self.refresh()

    def _read_judgements(self, session: SessionFolder) -> None:
        labels = self._context.state.labels
        if labels != self._labels and not self.query.held_out:
            self._labels = labels
            rows = list(self.rows.values())
            read = functools.partial(_read_judgements, session, self.query, rows)
            self._screen.read_in_thread("judgements", read)

    # -- what was read -------------------------------------------------------------------------

    def take(self, message: PageRead, *, unwritten: bool) -> bool:
        """Replaces the rows; False if this page is not wanted any more.

        Args:
            message: the page.
            unwritten: whether judgements are still being written, so that those of the page may be
                older. It is read again with :meth:`read_again`.
        """
        request = message.request
        if (request.query, request.page) != (self.query, self.page) or unwritten:
            return False
        if self.frozen and not request.asked:
            self._labels = None  # the judgements of this page are not shown
            return False
        if not message.rows and self.page:
            self.page -= 1
            self._context.say("this is the last page")
            return False
        self.rows = {key_of(row): row for row in message.rows}
        self._last_step, self._asked = message.last_step, False
        self.new.list_read(request.attempts)
        return True

    def take_judgements(self, message: JudgementsRead) -> list[SampleRow]:
        """Takes judgements of rows that are still listed; returns the rows that have changed."""
        if message.query != self.query:
            return []
        changed = [row for row in message.rows if self.rows.get(key_of(row), row) != row]
        self.rows |= {key_of(row): row for row in changed}
        return changed

    def take_count(self, message: NewCounted) -> None:
        """Takes the number of new samples, unless the list was read again meanwhile."""
        if self._last_step is not None:
            self.new.take(message, self.query, self._last_step)


# -- in a worker thread ----------------------------------------------------------------------------


def _read_page(session: SessionFolder, request: PageRequest) -> PageRead:
    last, offset = request.last_step, request.page * PAGE_SIZE
    with SampleReader(session) as samples:
        if last is None:
            last = samples.newest_step(held_out=request.query.held_out)
        rows = samples.page(request.query, PAGE_SIZE, offset, last_step=last)
    return PageRead(request, rows, last)


def _read_judgements(
    session: SessionFolder, query: SampleQuery, rows: list[SampleRow]
) -> JudgementsRead:
    return JudgementsRead(query, list(with_judgements(session, rows)))
