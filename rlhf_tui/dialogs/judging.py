"""Fast judging: unjudged responses one after another, by keys alone."""

import functools
from collections import deque
from collections.abc import Callable
from typing import ClassVar

import msgspec
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.worker import get_current_worker

from engine.errors import RlhfError
from engine.journal.judgements.labels import Response, set_label, set_note
from engine.journal.rows import Judgement, SampleRow
from engine.journal.samples import SampleQuery, SampleReader
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import Dialog, InputDialog
from rlhf_tui.dialogs.judging_queue import POOL_SIZE, Decision, JudgingQueue
from rlhf_tui.state.label_writer import LabelWriter, LabelWritten
from rlhf_tui.widgets.lines import Lines, Piece, Row, justified
from rlhf_tui.widgets.samples.judgement import LABEL_MARKS
from rlhf_tui.widgets.samples.turns import heading, response_rows
from rlhf_tui.widgets.scroll_list import ScrollText
from rlhf_tui.widgets.wrap import wrap, wrap_row

ORDER_HELP = {
    "uncertain": "by uncertainty",
    "outliers": "score outliers first",
    "random": "at random",
}
KEYS: Row = [
    piece
    for key, name in (
        ("+", "good"), ("-", "bad"), ("!", "hack"), ("s", "skip"), ("u", "undo"), ("W", "note"),
        ("o", "order"), ("esc", "close"),
    )
    for piece in ((f" {key} ", "key"), (f"{name} ", "dim"))
]  # fmt: skip


class ResponseText(ScrollText, can_focus=False):
    """The response. It takes no keys, so that all of them judge."""

    with_scrollbar = True


class PoolRead(Message):
    """The responses without a judgement were read; `problem`: why not."""

    def __init__(self, pool: list[SampleRow], problem: str = "") -> None:
        super().__init__()
        self.pool, self.problem = pool, problem


class JudgingDialog(Dialog[None]):
    """A queue of unjudged responses. It covers the terminal, because the scores are hidden.

    A response's score is shown with the judgement, after it. The judgement counts as soon as it is
    in the file: a process that is killed loses none that was counted.
    """

    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("plus,g", "judge('good')", "good", show=False),
        Binding("minus,b", "judge('bad')", "bad", show=False),
        Binding("exclamation_mark,h", "judge('hack')", "hack", show=False),
        Binding("s,space", "skip", "skip", show=False),
        Binding("u", "undo", "undo", show=False),
        Binding("W", "note", "note on this response", show=False),
        Binding("o", "order", "order of the rest", show=False),
        Binding("down,j", "scroll_text(1)", "down", show=False),
        Binding("up,k", "scroll_text(-1)", "up", show=False),
        Binding("q", "cancel", "close", show=False),
    ]

    def __init__(self, session: SessionFolder, who: str, now: Callable[[], float]) -> None:
        """For a session.

        Args:
            session: the session whose responses are judged.
            who: the operator who judges.
            now: the wall clock, seconds since the epoch.
        """
        super().__init__(f"Judge responses of {session.name}")
        self._session = session
        self._who = who
        self._now = now
        self.queue: JudgingQueue | None = None
        self._problem = ""
        self._unwritten: deque[Decision | None] = deque()
        """What is being written: a judgement, or None for a note or a label that is removed."""
        self._leaving = False

    @functools.cached_property
    def _writer(self) -> LabelWriter:
        return LabelWriter(self.post_message)

    def body(self) -> ComposeResult:
        """Progress, the outcome of the last judgement, the response, the keys."""
        yield Lines(id="judging-progress")
        yield Lines(id="judging-last")
        yield ResponseText(id="judging-text")
        yield Lines(id="judging-keys")

    def on_mount(self) -> None:
        """Reads the responses."""
        self._show_queue()
        self._read_pool()

    def on_resize(self) -> None:
        """Breaks the lines for the new width."""
        self.call_after_refresh(self._show_queue)

    @work(thread=True)
    def _read_pool(self) -> None:
        try:
            with SampleReader(self._session) as samples:
                message = PoolRead(samples.page(SampleQuery(judged=False), POOL_SIZE))
        except RlhfError as error:
            message = PoolRead([], str(error))
        if not get_current_worker().is_cancelled:
            self.post_message(message)

    def on_pool_read(self, message: PoolRead) -> None:
        """Shows the first response."""
        self._problem = message.problem
        self.queue = JudgingQueue(message.pool)
        self._show_queue()

    # -- keys ----------------------------------------------------------------------------------

    def action_judge(self, label: str) -> None:
        """Labels the response and shows the next one."""
        if self.queue is None or (decision := self.queue.decide(label)) is None:
            return
        self._write_label(decision.row, label, decision)

    def action_skip(self) -> None:
        """Shows the next response; this one is not judged."""
        if self.queue is not None:
            self.queue.decide(None)
            self._show_queue()

    def action_undo(self) -> None:
        """Takes the last judgement or skip back."""
        if self.queue is None or (decision := self.queue.undo()) is None:
            return
        if decision.label is None:
            self._show_queue()
        else:
            self._write_label(decision.row, None, None)

    def action_order(self) -> None:
        """Sorts the rest by the next order."""
        if self.queue is not None:
            self.queue.cycle_order()
            self._show_queue()

    def action_note(self) -> None:
        """Asks for a note on the response."""
        if self.queue is None or (row := self.queue.current) is None:
            return
        queue, response = self.queue, Response.of(row)
        hint: list[Row] = [[("An empty note removes it.", "dim")]]

        def take(text: str | None) -> None:
            if text is None:
                return
            judgement = Judgement(label=None, note=text or None, who=self._who, time=self._now())
            queue.replace(msgspec.structs.replace(row, judgement=judgement))
            self._write(
                lambda: set_note(self._session, row.prompt, response, text, self._who), None
            )

        title, note = "Note on this response", row.note or ""
        self.app.push_screen(
            InputDialog(title, hint, note, lambda _: (True, ""), verb="save"), take
        )

    def action_scroll_text(self, lines: int) -> None:
        """Scrolls a response that is longer than the terminal."""
        self.query_one(ResponseText).action_move(lines)

    def close_with(self, result: None) -> None:
        """Closes once everything is written."""
        self._leaving = True
        if not self._unwritten:
            super().close_with(result)

    # -- writing -------------------------------------------------------------------------------

    def _write_label(self, row: SampleRow, label: str | None, decision: Decision | None) -> None:
        response, who = Response.of(row), self._who
        self._write(lambda: set_label(self._session, row.prompt, response, label, who), decision)

    def _write(self, change: Callable[[], None], decision: Decision | None) -> None:
        self._unwritten.append(decision)
        self._writer.write(change)
        self._show_queue()

    def on_label_written(self, message: LabelWritten) -> None:
        """Counts the judgement, or takes back one that could not be written."""
        decision = self._unwritten.popleft()
        self._problem = message.problem
        queue = self.queue
        if message.problem and queue is not None and decision in queue.decisions:
            queue.take_back(decision)  # unless it was undone meanwhile
        if self._leaving and not self._unwritten:
            super().close_with(None)
            return
        self._show_queue()

    # -- what is shown -------------------------------------------------------------------------

    def _show_queue(self) -> None:
        """Shows the queue as it is."""
        text = self.query_one(ResponseText)
        progress = self.query_one("#judging-progress", Lines)
        last = self.query_one("#judging-last", Lines)
        row = self.queue.current if self.queue is not None else None
        width = max(text.size.width - 2, 10)
        progress.show([self._progress(progress.size.width)])
        last.show([self._last()])
        text.set_body(self._text(row, width))
        self.query_one("#judging-keys", Lines).show([KEYS])

    def _progress(self, width: int) -> Row:
        queue = self.queue
        if queue is None:
            return [(" reading …", "dim")]
        written = queue.judged - sum(d is not None for d in self._unwritten)
        left: list[Piece] = [(f" {written}/{queue.total}", "strong"), (" judged   ", "dim")]
        left.append((ORDER_HELP[queue.order], "accent"))
        same, of = queue.agreement()
        right: Row = [("agreement ", "dim"), (f"{same}/{of} ", "strong")] if of else []
        return justified(left, right, width)

    def _last(self) -> Row:
        """The last judgement and the score of its response, which was hidden before."""
        if self._problem:
            return [(f" {self._problem}", "bad")]
        queue = self.queue
        if queue is None or not queue.decisions:
            return [(" the score of a response is shown after its judgement", "dim")]
        decision = queue.decisions[-1]
        if decision.label is None:
            return [(" last: skipped", "dim")]
        glyph, tone = LABEL_MARKS[decision.label]
        row: list[Piece] = [(" last: ", "dim"), (f"{glyph} {decision.label}", tone)]
        share, agrees = queue.share_below(decision.row), queue.agrees(decision)
        if share is None:
            return [*row, ("   no score", "dim")]
        row.append(
            (f"   score {fmt.number(decision.row.score)}, above {share:.0%} of these: ", "dim")
        )
        verdict: Piece = ("the score agrees", "good") if agrees else ("the score disagrees", "warn")
        return [*row, verdict]

    def _text(self, row: SampleRow | None, width: int) -> list[Row]:
        if row is None:
            if self.queue is None:
                return []
            name, root = self._session.name, self._session.folder.parent
            samples = fmt.command("samples", name, root=root)
            done = "the queue is done" if self.queue.judged else "no response without a judgement"
            help_text = f" {done}: esc closes it, J opens the next one; {samples}"
            return list(wrap_row([(help_text, "dim")], width))
        facts = f"step {row.step}  #{row.index}  {fmt.plural(row.length, 'token')}"
        if row.replies is not None:
            facts += f"  {fmt.plural(len(row.replies) + 1, 'turn')}"
        head: list[Piece] = [(facts, "dim")]
        if not row.ended:
            head.append(("  ✂ cut off", "warn"))
        rows: list[Row] = [head]
        if row.note:
            rows += [[(line, "key")] for line in wrap(f"✎ {row.note}", width)]
        rows += [[], [("PROMPT", "dim")], *([(line, "dim")] for line in wrap(row.prompt, width))]
        rows += [[], heading(row.replies), *response_rows(row.response, row.replies, width)]
        return [[(" ", ""), *line] for line in rows]
