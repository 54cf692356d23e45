"""Labels and notes on the selected sample."""

import functools
from collections.abc import Callable

import msgspec
from textual.binding import Binding, BindingType
from textual.screen import Screen

from engine.journal.judgements.labels import Response, set_label, set_note
from engine.journal.rows import Judgement, SampleRow
from engine.session.folder import SessionFolder
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.label_writer import LabelWriter, LabelWritten
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.samples.judgement import key_of

BINDINGS: list[BindingType] = [
    Binding("plus", "label('good')", "good"),
    Binding("minus", "label('bad')", "bad"),
    Binding("exclamation_mark", "label('hack')", "hack"),
    Binding("W", "remark", "note on this response", show=False),
]
"""Keys of the screen whose actions call :class:`SampleLabels`."""


class SampleLabels:
    """Sets labels and notes, and has every judgement of the screen written in order.

    A judgement is shown at once and written afterwards. If it cannot be written, the screen first
    reverts to the previous judgement, and then shows what the file holds.
    """

    def __init__(
        self,
        screen: Screen[None],
        context: AppContext,
        *,
        selected: Callable[[], SampleRow | None],
        show: Callable[[SampleRow], None],
        read_again: Callable[[], None],
    ) -> None:
        """For a screen of samples.

        Args:
            screen: receives :class:`LabelWritten`, and shows the dialog.
            context: the app.
            selected: returns the sample under the cursor.
            show: shows a sample with its new judgement.
            read_again: reads the file again.
        """
        self._screen = screen
        self._context = context
        self._selected = selected
        self._show = show
        self._read_again = read_again
        self.unwritten = 0
        """Judgements that are not in the file yet; what is read meanwhile may be older."""
        self._before: dict[tuple[int, int, int], SampleRow] = {}
        """The responses with these judgements, as they were before."""

    @functools.cached_property
    def _writer(self) -> LabelWriter:
        return LabelWriter(self._screen.post_message)

    def toggle(self, label: str) -> None:
        """Sets the label of the selected sample, or removes it if it is set already."""
        row = self._selected()
        if row is None:
            return
        new = None if row.label == label else label
        response, who = Response.of(row), self._context.who
        self.write(lambda session: set_label(session, row.prompt, response, new, who))
        self._show_changed(row, new, row.note)

    def ask_note(self) -> None:
        """Asks for a note on the selected sample."""
        row = self._selected()
        if row is None:
            return
        rows: list[Row] = [
            [(f"Response #{row.index} of step {row.step}; an empty note removes it.", "dim")]
        ]
        response, who = Response.of(row), self._context.who

        def take(text: str | None) -> None:
            if text is not None:
                self.write(lambda session: set_note(session, row.prompt, response, text, who))
                self._show_changed(row, row.label, text or None)

        title = f"Note on a response of {self._context.state.name}"
        dialog = InputDialog(title, rows, row.note or "", lambda _: (True, ""), verb="save")
        self._screen.app.push_screen(dialog, take)

    def _show_changed(self, row: SampleRow, label: str | None, note: str | None) -> None:
        judgement = Judgement(
            label=label, note=note, who=self._context.who, time=self._context.now()
        )
        self._before.setdefault(key_of(row), row)
        self._show(msgspec.structs.replace(row, judgement=judgement))

    def session_changed(self) -> None:
        """Another session was opened: nothing of the previous one is restored."""
        self._before.clear()

    def write(self, change: Callable[[SessionFolder], None]) -> None:
        """Writes a judgement of the open session in a thread; :class:`LabelWritten` follows."""
        session = self._context.session
        if session is not None:
            self.unwritten += 1
            self._writer.write(functools.partial(change, session))

    def written(self, message: LabelWritten) -> None:
        """Reverts a displayed judgement that was not written; reads again after the last write.

        Whatever has prevented the write may prevent the reading, too.
        """
        self.unwritten -= 1
        if message.problem:
            self._context.say(message.problem, "error")
            for row in self._before.values():
                self._show(row)
        if not self.unwritten:
            self._before.clear()
            self._read_again()
