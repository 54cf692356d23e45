"""The samples: a table over all steps, and the selected sample."""

import functools
from typing import ClassVar

import msgspec
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.worker import get_current_worker

from engine.errors import RlhfError
from engine.journal.rows import SampleRow
from engine.journal.samples import SAMPLE_ORDERS, SampleQuery, SampleReader
from engine.protocol.rank_messages import TokenArrays
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens import sample_comparison, sample_labels
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.sample_comparison import ComparisonRead, SampleComparison
from rlhf_tui.screens.sample_filter import HINT, parse_filter
from rlhf_tui.screens.sample_labels import LabelWritten, SampleLabels
from rlhf_tui.state.messages import CommandAnswered, HeaderSelected, RowHighlighted, RowSelected
from rlhf_tui.widgets.lines import Lines, Piece, Row
from rlhf_tui.widgets.samples.judgement import key_of, mark
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.table import Column, Table

PAGE = 500
ORDER_TITLES = {"step": "step", "score": "score", "kl": "KL", "length": "len"}


class SamplesRead(Message):
    """A page of samples was read."""

    def __init__(self, query: SampleQuery, page: int, rows: list[SampleRow]) -> None:
        super().__init__()
        self.query, self.page, self.rows = query, page, rows


class ArraysRead(Message):
    """The token values of a sample were read."""

    def __init__(self, key: tuple[int, int], arrays: TokenArrays | None) -> None:
        super().__init__()
        self.key, self.arrays = key, arrays


class SamplesScreen(SessionScreen):
    """Mode 3."""

    MODE = "samples"
    WRITES = frozenset({"label", "remark", "better"})
    READ_ONLY = "read-only: labelling disabled"
    AUTO_FOCUS = "Table"
    BINDINGS: ClassVar[list[BindingType]] = [
        *sample_labels.BINDINGS,
        *sample_comparison.BINDINGS,
        Binding("slash,f", "filter", "filter"),
        Binding("v", "view", "tokens"),
        Binding("n", "next(1)", "next response", show=False),
        Binding("N", "next(-1)", "previous response", show=False),
        Binding("full_stop,greater_than_sign", "page(1)", "next page", show=False),
        Binding("comma,less_than_sign", "page(-1)", "previous page", show=False),
        Binding("z", "enlarge", "full screen"),
        Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse"),
        Binding("escape", "back", "back: table, no filter", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._query = SampleQuery()
        self._filter = ""
        self._page = 0
        self._rows: dict[tuple[int, int], SampleRow] = {}
        self._shown: tuple[object, ...] | None = None
        self._labels_read: tuple[int, ...] = ()
        """The value of `state.labels` for which the screen was read."""

    @functools.cached_property
    def labels(self) -> SampleLabels:
        """Labels and notes."""
        return SampleLabels(
            self, self.context,
            selected=self.selected, show=self.show_judgement, read_again=self.read_again,
        )  # fmt: skip

    @functools.cached_property
    def comparison(self) -> SampleComparison:
        """Compares the selected sample with another response."""
        return SampleComparison(self, self.context, self.labels, selected=self.selected)

    def compose_body(self) -> ComposeResult:
        """The table, and the selected sample beside or below it."""
        yield Lines(id="filter")
        with Container(id="panes"):
            yield Table(
                [
                    Column("step", 6, right=True),
                    Column("#", 3, right=True),
                    Column("score", 7, right=True),
                    Column("KL", 7, right=True),
                    Column("len", 4, right=True),
                    Column("", 1),
                    Column("", 2),
                    Column("response", 10, flexible=True),
                ],
                id="samples",
            )
            yield SampleView(id="sample")

    def refresh_content(self) -> None:
        """Reads the page again if it may have changed."""
        state = self.context.state
        live_page = self._page == 0 and self._query.order == "step" and self._query.descending
        step = state.head.step if live_page else -1
        attempts = len(state.head.attempts)  # a roll back changes every page
        wanted = (state.name, attempts, step, state.labels, self._query, self._page)
        if wanted != self._shown and self.context.session is not None:
            self._shown = wanted
            self.read_page(self._query, self._page)
        if state.labels != self._labels_read:
            self._labels_read = state.labels
            self.comparison.read_again()
        self._show_query()

    def session_changed(self) -> None:
        """Drops the samples of the last session."""
        self.comparison.session_changed()
        self._rows = {}
        self._page = 0
        self._shown = None
        self.query_one(Table).set_rows([])
        self.query_one(SampleView).read(None, None)

    # -- reading, in a thread ------------------------------------------------------------------

    @work(thread=True, exclusive=True, group="page")
    def read_page(self, query: SampleQuery, page: int) -> None:
        """Reads a page of samples."""
        session = self.context.session
        if session is None:
            return
        try:
            with SampleReader(session) as samples:
                rows = samples.page(query, PAGE, page * PAGE)
        except RlhfError as error:
            self.context.say_later(str(error), "error")
            return
        if not get_current_worker().is_cancelled:
            self.post_message(SamplesRead(query, page, rows))

    @work(thread=True, exclusive=True, group="arrays")
    def read_arrays(self, key: tuple[int, int], attempt: int) -> None:
        """Reads the token values of a sample."""
        session = self.context.session
        if session is None:
            return
        try:
            with SampleReader(session) as samples:
                arrays = samples.arrays(*key, attempt)
        except RlhfError:
            arrays = None
        if not get_current_worker().is_cancelled:
            self.post_message(ArraysRead(key, arrays))

    def on_samples_read(self, message: SamplesRead) -> None:
        """Shows a page, unless another page was requested meanwhile."""
        if (message.query, message.page) != (self._query, self._page) or self.labels.unwritten:
            return
        if not message.rows and self._page:
            self._page -= 1
            self.context.say("this is the last page")
            return
        self._rows = {(r.step, r.index): r for r in message.rows}
        table = self.query_one(Table)
        table.sorted_by = ORDER_TITLES[self._query.order]
        table.descending = self._query.descending
        table.matching = self._query.text
        table.set_rows([(key, _cells(row)) for key, row in self._rows.items()], self._empty())
        self._show_query()
        view, row = self.query_one(SampleView), self._rows.get(table.key)
        if row is not None and view.sample is not None and key_of(row) == key_of(view.sample):
            self.show_judgement(row)
        elif row is not None:
            self._select(table.key)

    def _empty(self) -> list[Row]:
        name = self.context.state.name
        if self._filter:
            return [[(f" no response matches '{self._filter}'; esc removes the filter", "dim")]]
        if not self.context.state.head.step:
            return [[(" no responses before the first step is done", "dim")]]
        return [[(f" no responses were kept (log.samples); see rlhf-tui samples {name}", "dim")]]

    def _show_query(self) -> None:
        table = self.query_one(Table)
        row: list[Piece] = [(" sorted by ", "dim"), (ORDER_TITLES[self._query.order], "strong")]
        row.append((" descending" if self._query.descending else " ascending", "dim"))
        if self._filter:
            row += [("   only ", "dim"), (self._filter, "accent")]
        if self._page or table.count() == PAGE:
            row += [(f"   page {self._page + 1}  , . page", "dim")]
        row += [(f"   {table.count()} responses", "dim")]
        row += [("   tokens: ", "dim"), (self.query_one(SampleView).mode, "strong")]
        self.query_one("#filter", Lines).show([row])

    # -- the sample under the cursor -----------------------------------------------------------

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """Shows the sample under the cursor."""
        if message.table == "samples":
            self._select(message.key)

    def _select(self, key: tuple[int, int] | None) -> None:
        row = self._rows.get(key) if key else None
        self.query_one(SampleView).read(row, None)
        if key is not None and row is not None:
            self.read_arrays(key, row.attempt)
        self.comparison.select(row)

    def selected(self) -> SampleRow | None:
        """The sample under the cursor."""
        return self._rows.get(self.query_one(Table).key)

    def show_judgement(self, row: SampleRow) -> None:
        """Shows a sample of this page with another judgement."""
        self._rows[row.step, row.index] = row
        table, view = self.query_one(Table), self.query_one(SampleView)
        table.set_rows([(key, _cells(r)) for key, r in self._rows.items()])
        if view.sample is not None and key_of(view.sample) == key_of(row):
            view.read(row, view.arrays)

    def read_again(self) -> None:
        """Reads the page and the comparison again."""
        self.comparison.read_again()
        self._shown = None
        self.refresh_content()

    def on_arrays_read(self, message: ArraysRead) -> None:
        """Shows token values."""
        if message.key == self.query_one(Table).key:
            self.query_one(SampleView).read(self._rows.get(message.key), message.arrays)

    @on(RowSelected)
    def _focus_sample(self) -> None:
        self.query_one(SampleView).focus()

    def on_label_written(self, message: LabelWritten) -> None:
        """A judgement was written."""
        self.labels.written(message)

    def on_comparison_read(self, message: ComparisonRead) -> None:
        """The other responses were read."""
        self.comparison.take(message)

    def on_command_answered(self, message: CommandAnswered) -> None:
        """A reply to the probe of a comparison."""
        self.comparison.take_reply(message)

    # -- keys ----------------------------------------------------------------------------------

    def action_label(self, label: str) -> None:
        """Sets a label, or removes it."""
        self.labels.toggle(label)

    def action_remark(self) -> None:
        """Asks for a note."""
        self.labels.ask_note()

    def action_compare(self) -> None:
        """Cycles through earlier responses, the reference's response and no comparison."""
        self.comparison.next_kind()

    def action_other(self, by: int) -> None:
        """Compares with another earlier response."""
        self.comparison.show_other(by)

    def action_better(self, which: str) -> None:
        """Prefers this response or the other one, or removes the preference."""
        self.comparison.toggle_preference(which)

    def action_filter(self) -> None:
        """Asks for a filter."""

        def take(text: str | None) -> None:
            if text is not None:
                self._set(text)

        self.app.push_screen(InputDialog("Filter", HINT, self._filter, lambda _: (True, "")), take)

    def _set(self, text: str) -> None:
        self._filter = text
        self._query = parse_filter(text, self._query)
        self._page = 0
        self.refresh_content()

    def action_sort(self) -> None:
        """Sorts by the next column."""
        at = (SAMPLE_ORDERS.index(self._query.order) + 1) % len(SAMPLE_ORDERS)
        self._query = msgspec.structs.replace(self._query, order=SAMPLE_ORDERS[at])
        self._page = 0
        self.refresh_content()

    def on_header_selected(self, message: HeaderSelected) -> None:
        """Sorts by the column whose title was clicked; again reverses the order."""
        order = next((o for o, title in ORDER_TITLES.items() if title == message.title), None)
        if order == self._query.order:
            self.action_reverse()
        elif order is not None:
            self._query = msgspec.structs.replace(self._query, order=order)
            self._page = 0
            self.refresh_content()

    def action_reverse(self) -> None:
        """Reverses the order."""
        descending = not self._query.descending
        self._query = msgspec.structs.replace(self._query, descending=descending)
        self._page = 0
        self.refresh_content()

    def action_page(self, by: int) -> None:
        """Turns pages of the table."""
        if by > 0 and self.query_one(Table).count() < PAGE:
            self.context.say("this is the last page")
            return
        self._page = max(self._page + by, 0)
        self.refresh_content()

    def action_next(self, by: int) -> None:
        """Selects the next sample, whatever has the focus."""
        self.query_one(Table).action_move(by)

    def action_view(self) -> None:
        """Cycles through text and the numbers of each token."""
        self.query_one(SampleView).cycle()
        self._show_query()

    def action_enlarge(self) -> None:
        """Shows the sample in full screen, or with the table."""
        panes = self.query_one("#panes")
        panes.toggle_class("alone")
        target = SampleView if panes.has_class("alone") else Table
        self.query_one(target).focus()

    def action_back(self) -> None:
        """Leaves one level: full screen, the comparison, the sample, the filter."""
        panes = self.query_one("#panes")
        if panes.has_class("alone"):
            self.action_enlarge()
        elif self.comparison.leave():
            return
        elif not self.query_one(Table).has_focus:
            self.query_one(Table).focus()
        elif self._filter:
            self._set("")


def _cells(row: SampleRow) -> list[Piece]:
    score = row.score
    return [
        (str(row.step), "dim"),
        (str(row.index), "dim"),
        (fmt.number(score, 2), "strong"),
        (fmt.number(row.kl, 1), ""),
        (str(row.length), ""),
        ("" if row.ended else "✂", "warn"),
        mark(row),
        (row.response.strip(), ""),
    ]
