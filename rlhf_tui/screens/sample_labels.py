"""Labels and notes on the answer under the cursor."""

import functools
from collections.abc import Callable
from typing import ClassVar

import msgspec
from textual.binding import Binding, BindingType
from textual.message import Message

from engine.journal.labels import Response, set_label, set_note
from engine.journal.rows import Judgement, SampleRow
from engine.session.folder import Session
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.state.label_writer import LabelWriter
from rlhf_tui.widgets.lines import Row


class LabelWritten(Message):
    """A judgement was written; `problem`: why not."""

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem


class Judging(SessionScreen):
    """A screen of answers that can be judged.

    What a key says is shown at once and written after that; if it cannot be written, what the file
    says is shown again.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("plus", "label('good')", "good"),
        Binding("minus", "label('bad')", "bad"),
        Binding("exclamation_mark", "label('hack')", "hack"),
        Binding("W", "remark", "note on this answer", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.unwritten = 0
        """Judgements that are not on the file yet: what is read meanwhile may be older."""

    def chosen(self) -> SampleRow | None:
        """The answer that is meant; overridden."""
        return None

    def show_again(self, row: SampleRow) -> None:
        """It is judged otherwise now; overridden."""

    def read_again(self) -> None:
        """The file is to be asked again; overridden."""

    @functools.cached_property
    def _judge(self) -> LabelWriter:
        return LabelWriter(lambda problem: self.post_message(LabelWritten(problem)))

    def action_label(self, label: str) -> None:
        """Labels it; the same label again takes it away."""
        row = self.chosen()
        if row is None or not self.may_judge():
            return
        new = None if row.label == label else label
        answer, who = Response.of(row), self.desk.who
        self.write(lambda session: set_label(session, row.prompt, answer, new, who))
        self._now(row, new, row.note)

    def action_remark(self) -> None:
        """A note on it."""
        row = self.chosen()
        if row is None or not self.may_judge():
            return
        rows: list[Row] = [
            [(f"On answer #{row.index} of step {row.step}; empty takes it away.", "dim")]
        ]
        answer, who = Response.of(row), self.desk.who

        def take(text: str | None) -> None:
            if text is not None:
                self.write(lambda session: set_note(session, row.prompt, answer, text, who))
                self._now(row, row.label, text or None)

        note = row.note or ""
        self.app.push_screen(
            InputDialog("Note on this answer", rows, note, lambda _: (True, "")), take
        )

    def _now(self, row: SampleRow, label: str | None, note: str | None) -> None:
        now = Judgement(label=label, note=note, who=self.desk.who, time=self.desk.now())
        self.show_again(msgspec.structs.replace(row, judgement=now))

    def may_judge(self) -> bool:
        """Whether judgements are taken here; says so where not."""
        if self.desk.read_only:
            self.desk.say("read-only: nothing is judged from here", "warning")
        return not self.desk.read_only and self.desk.session is not None

    def write(self, change: Callable[[Session], None]) -> None:
        """Has a judgement written."""
        session = self.desk.session
        if session is not None:
            self.unwritten += 1
            self._judge.write(functools.partial(change, session))

    def on_label_written(self, message: LabelWritten) -> None:
        """What is on the file now may be another page than the one that is shown."""
        self.unwritten -= 1
        if message.problem:
            self.desk.say(message.problem, "error")
        if not self.unwritten:
            self.read_again()
