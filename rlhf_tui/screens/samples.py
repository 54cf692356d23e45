"""The samples: a table over all steps, and the selected sample."""

import functools
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.worker import Worker

from engine.journal.judgements.labels import Key
from engine.journal.rows import SampleRow
from engine.journal.samples import SampleReader
from engine.protocol.commands import Probe
from engine.protocol.rank_messages import TokenArrays
from engine.session.file_signature import FileSignature
from engine.session.folder import SessionFolder
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.parts import sample_comparison, sample_labels, sample_list
from rlhf_tui.screens.parts.new_samples import COUNT_GROUP, NewCounted
from rlhf_tui.screens.parts.sample_comparison import ComparisonRead, SampleComparison
from rlhf_tui.screens.parts.sample_filter import HINT, check_filter
from rlhf_tui.screens.parts.sample_labels import SampleLabels
from rlhf_tui.screens.parts.sample_list import (
    ORDER_TITLES,
    PAGE_GROUP,
    JudgementsRead,
    PageRead,
    SampleList,
)
from rlhf_tui.screens.parts.sample_query_line import empty_list, not_shown_yet, query_line
from rlhf_tui.screens.parts.sample_table import SamplesTable
from rlhf_tui.state.label_writer import LabelWritten
from rlhf_tui.state.messages import CommandAnswered, HeaderSelected, RowHighlighted, RowSelected
from rlhf_tui.widgets.lines import Lines, justified, row_width
from rlhf_tui.widgets.samples.judgement import key_of
from rlhf_tui.widgets.samples.sample_view import SampleView


class ArraysRead(Message):
    """The token values of a sample were read.

    `kept`: which samples of its step have token values, by index.
    """

    def __init__(self, key: Key, arrays: TokenArrays | None, kept: list[int]) -> None:
        super().__init__()
        self.key, self.arrays, self.kept = key, arrays, kept


class SamplesScreen(SessionScreen):
    """Lists the responses and shows the selected one; the screen of the key 3."""

    MODE = "samples"
    LISTS = True
    WRITES = frozenset({"label", "remark", "better", "judge"})
    READ_ONLY = "responses cannot be judged"
    AUTO_FOCUS = "Table"
    BINDINGS: ClassVar[list[BindingType]] = [
        *sample_comparison.BINDINGS,
        *sample_labels.BINDINGS,
        Binding("slash,f", "filter", "filter"),
        Binding("v", "view", "tokens"),
        *sample_list.BINDINGS,
        Binding("E", "held_out", "held-out"),
        Binding("n", "next(1)", "next response", show=False),
        Binding("N", "next(-1)", "previous response", show=False),
        Binding("z", "enlarge", "full screen"),
        Binding("P", "probes", "probes of this run", show=False),
        Binding("J", "judge", "judge one after another", show=False),
        Binding("escape", "back", "back: table, no filter", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._labels_read: FileSignature = ()
        """The value of `state.labels` for which the comparison was read."""

    @property
    def table(self) -> SamplesTable:
        """The list."""
        return self.query_one(SamplesTable)

    @property
    def view(self) -> SampleView:
        """The sample under the cursor."""
        return self.query_one(SampleView)

    @functools.cached_property
    def samples(self) -> SampleList:
        """The rows of the table."""
        return SampleList(self, self.context)

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
            yield SamplesTable()
            yield SampleView()

    def refresh_content(self) -> None:
        """Reads again what may have changed."""
        self.samples.refresh()
        state = self.context.state
        if state.labels != self._labels_read:
            self._labels_read = state.labels
            self.comparison.read_again()
        self._show_query()

    def session_changed(self) -> None:
        """Drops the samples of the last session."""
        self.labels.session_changed()
        self.comparison.session_changed()
        self.samples.session_changed()
        self._clear()

    def _clear(self) -> None:
        self.table.set_rows([])
        self.view.read(None)

    def why_disabled(self, action: str) -> str:
        """Responses to held-out prompts cannot be judged, and have no token values."""
        if action == "held_out" and not self.context.state.curves.evaluated:
            return "no held-out responses: this run has no evaluation (eval.every)"
        if self.samples.query.held_out:
            if action in self.WRITES:
                return "held-out responses cannot be judged; only training responses can"
            if action == "view":
                return "token values are kept for training responses only"
        return super().why_disabled(action) or self.comparison.why_disabled(action)

    # -- the list ------------------------------------------------------------------------------

    def on_page_read(self, message: PageRead) -> None:
        """Shows a page, unless another one was requested meanwhile or the list is frozen."""
        table, samples, asked = self.table, self.samples, message.request.asked
        if samples.following and not asked and table.cursor:
            samples.freeze()  # the message of a key that has moved the cursor is still on its way
        if not samples.take(message, unwritten=bool(self.labels.unwritten)):
            return
        before = table.key
        select, samples.select = samples.select, None
        if samples.following:
            select = next(iter(samples.rows), None)
        table.show_list(samples, empty_list(samples, self.context.state), select)
        self.rows_read()
        samples.arrived |= not asked and before not in (None, table.key)
        self._show_query()
        if table.key == before and (row := self.selected()) is not None:
            self.show_judgement(row)

    def on_worker_state_changed(self, message: Worker.StateChanged) -> None:
        """Reads what the run has recorded while a page was read."""
        if message.worker.group in (PAGE_GROUP, COUNT_GROUP) and message.worker.is_finished:
            self.samples.refresh()

    def on_judgements_read(self, message: JudgementsRead) -> None:
        """Shows what was judged meanwhile in a frozen list."""
        if not self.labels.unwritten:
            for row in self.samples.take_judgements(message):
                self.show_judgement(row)

    def on_new_counted(self, message: NewCounted) -> None:
        """Shows how many responses are not in the list yet."""
        self.samples.take_count(message)
        self._show_query()

    def _show_query(self) -> None:
        table, samples, line = self.table, self.samples, self.query_one("#filter", Lines)
        state = self.context.state
        new = not_shown_yet(samples, live=state.live)
        shown = query_line(
            samples, state, cursor=table.cursor, count=table.count(),
            mode=self.view.mode,
            full_screen=self.query_one("#panes").has_class("alone"),
            room=line.size.width - row_width(new),
        )  # fmt: skip
        line.show([justified(shown, new, line.size.width)])

    # -- the sample under the cursor -----------------------------------------------------------

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """Shows the sample under the cursor. Moving the cursor freezes the list."""
        if message.table != "samples":
            return
        if message.moved:
            self.samples.freeze()
        row, session = self.samples.rows.get(message.key), self.context.session
        self.view.read(row)
        if row is not None and session is not None and not row.held_out:
            read = functools.partial(_read_arrays, session, message.key)
            self.read_in_thread("arrays", read)
        self.comparison.select(row)
        self._show_query()

    def selected(self) -> SampleRow | None:
        """The sample under the cursor."""
        return self.samples.rows.get(self.table.key)

    def show_judgement(self, row: SampleRow) -> None:
        """Shows a sample of this page with another judgement."""
        key, view = key_of(row), self.view
        self.samples.rows[key] = row
        self.table.show_row(row)
        if view.sample is not None and key_of(view.sample) == key:
            view.read(row, view.arrays, view.kept)

    def read_again(self) -> None:
        """Reads the written judgements of the page and of the comparison again."""
        self.comparison.read_again()
        self.samples.read_again()

    def on_arrays_read(self, message: ArraysRead) -> None:
        """Shows token values."""
        if message.key == self.table.key and not self.samples.query.held_out:
            row = self.samples.rows.get(message.key)
            self.view.read(row, message.arrays, message.kept)

    @on(RowSelected)
    def _focus_sample(self) -> None:
        self.samples.freeze()
        self.view.focus()

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
        if self.samples.freeze_to_judge():
            self.labels.toggle(label)

    def action_remark(self) -> None:
        """Asks for a note."""
        self.samples.freeze()
        self.labels.ask_note()

    def action_judge(self) -> None:
        """Opens the queue of unjudged responses."""
        from rlhf_tui.dialogs.judging import JudgingDialog  # noqa: PLC0415 - keeps start-up short

        if (session := self.context.session) is not None:
            self.samples.freeze()
            dialog = JudgingDialog(session, self.context.who, self.context.now)
            self.app.push_screen(dialog, lambda _: self.read_again())

    def action_compare(self) -> None:
        """Cycles through earlier responses, the reference's response and no comparison."""
        self.samples.freeze()
        self.comparison.next_kind()

    def action_other(self, by: int) -> None:
        """Compares with another earlier response."""
        self.samples.freeze()
        self.comparison.show_other(by)

    def action_better(self, which: str) -> None:
        """Prefers this response or the other one, or removes the preference."""
        if self.samples.freeze_to_judge():
            self.comparison.toggle_preference(which)

    def action_filter(self) -> None:
        """Asks for a filter."""

        def take(text: str | None) -> None:
            if text is not None:
                self.samples.set_filter(text)

        given = self.samples.filter
        dialog = InputDialog("Filter", HINT, given, check_filter, verb="filter")
        self.app.push_screen(dialog, take)

    def action_sort(self) -> None:
        """Sorts by the next column."""
        self.samples.sort()

    def on_header_selected(self, message: HeaderSelected) -> None:
        """Sorts by the column whose title was clicked; again reverses the order."""
        order = next((o for o, title in ORDER_TITLES.items() if title == message.title), None)
        if order is not None:
            self.samples.sort_by(order)

    def action_reverse(self) -> None:
        """Reverses the order."""
        self.samples.reverse()

    def action_page(self, by: int) -> None:
        """Turns pages of the table."""
        self.samples.turn_page(by)

    def action_show_new(self) -> None:
        """Shows the responses that were recorded since the list was frozen."""
        self.samples.show_new()

    def action_same_prompt(self) -> None:
        """Lists all responses to the selected prompt by step, or what was listed before."""
        self.samples.same_prompt(self.selected())

    def action_held_out(self) -> None:
        """Switches between the responses of training and those to held-out prompts."""
        self.comparison.leave()
        self.samples.switch()
        self.view.as_text()
        self._clear()
        self._show_query()
        self.refresh_keys()

    def action_probes(self) -> None:
        """Lists the probes of this run; a selected one is shown."""
        from rlhf_tui.dialogs.probes import ProbePicker  # noqa: PLC0415 - keeps start-up short

        state = self.context.state
        probes = [c for c in state.timeline.commands if c.command == Probe.name() and c.result]
        if probes:
            self.app.push_screen(ProbePicker(state.name, probes))
        else:
            self.context.say("no probes of this run yet; x probes it with a prompt")

    def action_next(self, by: int) -> None:
        """Selects the next sample, whatever has the focus."""
        self.table.action_move(by)

    def action_view(self) -> None:
        """Cycles through text and the numbers of each token."""
        self.samples.freeze()
        self.view.cycle()
        self._show_query()

    def action_enlarge(self) -> None:
        """Shows the sample in full screen, or with the table."""
        self.samples.freeze()
        panes = self.query_one("#panes")
        panes.toggle_class("alone")
        (self.view if panes.has_class("alone") else self.table).focus()
        self._show_query()

    def action_back(self) -> None:
        """Leaves one level: full screen, the comparison, the sample, the filter, one prompt."""
        panes = self.query_one("#panes")
        if panes.has_class("alone"):
            self.action_enlarge()
        elif self.comparison.leave():
            return
        elif not self.table.has_focus:
            self.table.focus()
        elif self.samples.filter:
            self.samples.set_filter("")
        else:
            self.samples.leave_prompt()


def _read_arrays(session: SessionFolder, key: Key) -> ArraysRead:
    """Reads the token values of a sample, in a worker thread."""
    attempt, step, index = key
    with SampleReader(session) as samples:
        arrays = samples.arrays(step, index, attempt)
        return ArraysRead(key, arrays, samples.with_arrays(step, attempt))
