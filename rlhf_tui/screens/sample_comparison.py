"""The answer under the cursor beside another one, and which of the two is the better one."""

import functools
from typing import ClassVar

import msgspec
from textual import work
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.worker import get_current_worker

from engine.errors import RlhfError
from engine.journal.labels import Key, LabelReader, Preference, Response, forget_preference, prefer
from engine.journal.reader import JournalReader
from engine.journal.rows import ProbeResponse, ProbeResult, SampleRow
from engine.journal.samples import MAX_COMPARED
from engine.protocol.commands import Probe
from rlhf_tui.screens.sample_labels import Judging
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.widgets.samples.comparison import ComparisonTarget
from rlhf_tui.widgets.samples.judgement import key_of
from rlhf_tui.widgets.samples.sample_view import SampleView

KINDS = ("", "earlier", "reference")
"""What an answer stands beside, in the order in which the key goes through them."""
Other = SampleRow | ProbeResponse
"""What an answer is held against: another one, or what the reference answered to a probe."""


class ComparisonRead(Message):
    """What an answer can be held against, and what was said of such pairs."""

    def __init__(
        self, key: Key, kind: str, others: list[Other],
        said: list[Preference], *, ask: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.key, self.kind, self.others, self.said = key, kind, others, said
        self.ask = ask
        """Whether the reference is asked where it has not answered."""


class Comparing(Judging):
    """A screen with a :class:`Reading`, which holds an answer against others to its prompt."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "beside", "beside another"),
        Binding("y", "better('this')", "this one is better", show=False),
        Binding("o", "better('other')", "the other is better", show=False),
        Binding("left,h", "other(-1)", "beside a newer one", show=False),
        Binding("right,l", "other(1)", "beside an older one", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._kind = KINDS[0]
        self._others: list[Other] = []
        self._at = 0
        self._said: list[Preference] = []
        self._of: Key | None = None
        """The answer that is shown with them."""
        self._known = False
        """Whether the others of the answer under the cursor are known."""
        self._probed: set[str] = set()
        """Prompts whose probe is on its way."""

    def session_changed(self) -> None:
        """Of another session nothing is known."""
        self._probed.clear()
        self.leave_comparison()

    # -- what it stands beside -----------------------------------------------------------------

    def action_beside(self) -> None:
        """Nothing, an earlier answer to the same prompt, the reference's answer, and again."""
        row, reading = self.chosen(), self.query_one(SampleView)
        if row is None:
            return
        if self._kind and not reading.comparing:
            reading.as_text()
        elif self._kind == "reference" and self._known and not self._others and self._may_ask(row):
            self.pointed_at(row, ask=True)  # somebody else may have asked it
        else:
            self._kind = KINDS[(KINDS.index(self._kind) + 1) % len(KINDS)]
            reading.as_text()
            self.pointed_at(row, ask=True)

    def leave_comparison(self) -> bool:
        """Whether there was one to leave."""
        left, self._kind = bool(self._kind), KINDS[0]
        self.pointed_at(None)
        return left

    def pointed_at(self, row: SampleRow | None, *, ask: bool = False) -> None:
        """Others stand beside it now; `ask`: the reference is asked where it has not answered."""
        self._others, self._said, self._at, self._known = [], [], 0, False
        self._of = key_of(row) if row is not None else None
        self._show()
        if row is not None and self._kind:
            self.read_beside(row, self._kind, ask=ask)

    def read_again(self) -> None:
        """The others may be judged otherwise, too."""
        row = self.chosen()
        if row is not None and self._kind:
            self.read_beside(row, self._kind)

    @work(thread=True, exclusive=True, group="beside")
    def read_beside(self, row: SampleRow, kind: str, *, ask: bool = False) -> None:
        """Asks the journal."""
        session = self.desk.session
        if session is None:
            return
        try:
            with JournalReader(session) as record, LabelReader(session) as labels:
                others: list[Other] = []
                if kind == "earlier":
                    others += record.samples.earlier(row)
                elif (found := record.last_reference_probe(row.prompt)) is not None:
                    others.append(found)
                said = labels.preferences(row.prompt)
        except RlhfError as error:
            self.desk.say_later(str(error), "error")
            return
        if get_current_worker().is_cancelled:
            return
        self.post_message(ComparisonRead(key_of(row), kind, others, said, ask=ask))

    def on_comparison_read(self, message: ComparisonRead) -> None:
        """The others have come; the one that is shown stays."""
        row = self.chosen()
        asked = (message.key, message.kind)
        if row is None or (key_of(row), self._kind) != asked or self.unwritten:
            return
        shown = self._others[self._at] if self._others else None
        self._others, self._said, self._known = message.others, message.said, True
        same = (i for i, other in enumerate(self._others) if _same(other, shown))
        self._at = next(same, 0)
        if message.ask and self._kind == "reference" and not self._others and self._may_ask(row):
            self._ask(row.prompt)
        self._show()

    def action_other(self, by: int) -> None:
        """Another one of the earlier answers."""
        if self._kind != "earlier":
            self.desk.say("d puts an earlier answer to the same prompt beside this one")
            return
        self._at = min(max(self._at + by, 0), max(len(self._others) - 1, 0))
        self._show()

    def _show(self) -> None:
        row, reading = self.chosen(), self.query_one(SampleView)
        if row is None or not self._kind:
            reading.hold_against(None)
            return
        if not self._others:
            title = "REFERENCE" if self._kind == "reference" else "OTHERS"
            reading.hold_against(
                ComparisonTarget(self._kind, title, row.response, lack=self._lack(row))
            )
            return
        other = self._others[self._at]
        if isinstance(other, ProbeResponse):
            title = f"REFERENCE, asked at step {other.step}"
        else:
            count = len(self._others)
            title = f"OTHER, step {other.step} #{other.index}"
            title += f" of attempt {other.attempt}" * other.left
            title += f" ({self._at + 1}/{count}{'+' * (count == MAX_COMPARED)})"
        better, who = self._verdict(row.response, other.response)
        reading.hold_against(
            ComparisonTarget(self._kind, title, row.response, other, "", better, who)
        )

    # -- the reference -------------------------------------------------------------------------

    def _lack(self, row: SampleRow) -> str:
        name = self.desk.state.name
        if row.prompt in self._probed:
            return "asked just now; it answers after the step in hand"
        if not self._known:
            return "reading …"
        if self._kind == "earlier":
            return "no other answer to this prompt was kept up to this step; d: the reference's"
        if self._may_ask(row):
            return "it was not asked this prompt yet; d asks it"
        if self.desk.read_only:
            return "it was not asked this prompt yet, and this terminal is read-only"
        return f"it was not asked this prompt yet; with an engine it can be: rlhf-tui resume {name}"

    def _may_ask(self, row: SampleRow) -> bool:
        session = self.desk.session
        live = session is not None and session.is_live() and not self.desk.read_only
        return live and row.prompt not in self._probed

    @functools.cached_property
    def _sender(self) -> CommandSender:
        return CommandSender(self.desk.who, self.post_message)

    def _ask(self, prompt: str) -> None:
        if self.desk.session is not None:
            self._probed.add(prompt)
            order = OutgoingCommand(self.desk.session, Probe(text=prompt), "probe with this prompt")
            self._sender.send(order)
            self._show()

    def on_command_answered(self, message: CommandAnswered) -> None:
        """The reference has answered; what else becomes of the probe, the app tells."""
        answer, command = message.answer, message.command
        if not isinstance(command, Probe) or (answer is not None and not answer.final):
            return
        self._probed.discard(command.text)
        row = self.chosen()
        if answer is not None and answer.result:
            message.stop()
            self.desk.say("the reference has answered")
            if row is not None and row.prompt == command.text and self._kind == "reference":
                found = ProbeResult.of(answer.result).reference
                self._others = [msgspec.structs.replace(found, step=answer.step)]
                self._known = True
        self._show()

    # -- the better one ------------------------------------------------------------------------

    def action_better(self, which: str) -> None:
        """Says which one is better; the same again takes it back."""
        row = self.chosen()
        if row is not None and self._kind and key_of(row) != self._of:
            self.pointed_at(row)  # typed ahead: what is shown are still another answer's others
        if row is None or not self._others or not self.query_one(SampleView).comparing:
            reading = self._kind and not self._known
            self.desk.say(
                "the other answer is still being read: y or o once it is shown"
                if reading
                else "d puts another answer beside this one; then y or o says which is better"
            )
            return
        if not self.may_judge():
            return
        other, prompt, who = self._others[self._at], row.prompt, self.desk.who
        mine, theirs = Response.of(row), _response(other)
        if self._verdict(mine.response, theirs.response)[0] == which:
            self.write(lambda session: forget_preference(session, prompt, mine, theirs))
            said: list[Preference] = []
        else:
            chosen, rejected = (mine, theirs) if which == "this" else (theirs, mine)
            self.write(lambda session: prefer(session, prompt, chosen, rejected, who))
            now = self.desk.now()
            said = [Preference(prompt=prompt, chosen=chosen, rejected=rejected, who=who, time=now)]
        pair = {mine.response, theirs.response}
        if len(pair) == 2:  # else the writing says that they are the same
            self._said = [*(p for p in self._said if _pair(p) != pair), *said]
        self._show()

    def _verdict(self, mine: str, theirs: str) -> tuple[str, str]:
        for said in self._said:
            if _pair(said) == {mine, theirs}:
                return ("this" if said.chosen.response == mine else "other"), said.who
        return "", ""


def _pair(said: Preference) -> set[str]:
    return {said.chosen.response, said.rejected.response}


def _response(other: Other) -> Response:
    """As a preference names it: without a place where it is the reference's."""
    if isinstance(other, SampleRow):
        return Response.of(other)
    return Response(response=other.response)


def _same(one: Other, other: Other | None) -> bool:
    if isinstance(one, SampleRow) and isinstance(other, SampleRow):
        return key_of(one) == key_of(other)
    return type(one) is type(other) and other is not None and one.step == other.step
