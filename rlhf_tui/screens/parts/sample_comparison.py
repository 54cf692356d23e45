"""Compares the selected sample with another response to its prompt, and records preferences."""

import functools
from collections.abc import Callable

import msgspec
from textual.binding import Binding, BindingType
from textual.message import Message

from engine.journal.judgements.labels import (
    Key,
    LabelReader,
    Preference,
    Response,
    forget_preference,
    prefer,
)
from engine.journal.reader import JournalReader
from engine.journal.rows import ProbeResponse, ProbeResult, SampleRow
from engine.journal.samples import MAX_COMPARED
from engine.protocol.commands import Probe
from engine.session.folder import SessionFolder
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.screens.parts.sample_labels import SampleLabels
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.widgets.samples.comparison import ComparisonTarget
from rlhf_tui.widgets.samples.judgement import key_of
from rlhf_tui.widgets.samples.sample_view import SampleView

KINDS = ("", "earlier", "reference")
"""Kinds of comparison, in the order of the key."""
Other = SampleRow | ProbeResponse
"""What a sample is compared with: another sample, or the reference's response to a probe."""
BINDINGS: list[BindingType] = [
    Binding("y", "better('this')", "this is better"),
    Binding("o", "better('other')", "other is better"),
    Binding("left,h", "other(-1)", "newer"),
    Binding("right,l", "other(1)", "older"),
    Binding("d", "compare", "compare"),
    Binding("shift+left,H", "other(-200)", "compare with the newest response", show=False),
    Binding("shift+right,L", "other(200)", "compare with the oldest response", show=False),
]
"""Keys of the screen whose actions call :class:`SampleComparison`; the footer shows those of a
comparison while there is one."""


class ComparisonRead(Message):
    """The responses a sample can be compared with, and the preferences between such pairs."""

    def __init__(
        self, key: Key, kind: str, others: list[Other], preferences: list[Preference]
    ) -> None:
        super().__init__()
        self.key, self.kind, self.others, self.preferences = key, kind, others, preferences


class SampleComparison:
    """Chooses what the selected sample is compared with, and records preferences."""

    def __init__(
        self,
        screen: SessionScreen,
        context: AppContext,
        labels: SampleLabels,
        *,
        selected: Callable[[], SampleRow | None],
    ) -> None:
        """For a screen with a :class:`SampleView`.

        Args:
            screen: has the view and the workers, and receives the messages.
            context: the app.
            labels: writes the preferences.
            selected: returns the sample under the cursor.
        """
        self._screen = screen
        self._context = context
        self._labels = labels
        self._selected = selected
        self._kind = KINDS[0]
        self._others: list[Other] = []
        self._index = 0
        self._preferences: list[Preference] = []
        self._shown: Key | None = None
        """The sample that the others were read for."""
        self._known = False
        """Whether the others of the selected sample are read."""
        self._ask_reference = False
        """Whether to ask the reference if the next reading finds no response of it. A reading may
        be replaced by another one, such as one for labels that have changed."""
        self._probed: set[str] = set()
        """Prompts whose probe has no reply yet."""

    @property
    def _view(self) -> SampleView:
        return self._screen.query_one(SampleView)

    def session_changed(self) -> None:
        """Another session was opened: drops the comparison and a pending probe."""
        self._probed.clear()
        self.leave()

    def why_disabled(self, action: str) -> str:
        """Why a key of a comparison is disabled; empty for one that is not."""
        if action == "better" and not self._kind:
            return "press d to compare with another response, then y or o"
        if action == "other" and self._kind != "earlier":
            return "press d to compare with an earlier response"
        return ""

    # -- what it is compared with --------------------------------------------------------------

    def next_kind(self) -> None:
        """Cycles through no comparison, earlier responses and the reference's response."""
        row, view = self._selected(), self._view
        if row is None:
            return
        if self._kind and not view.comparing:
            view.as_text()
        elif self._kind == "reference" and self._known and not self._others and self._may_ask(row):
            self.select(row, ask=True)  # another client may have asked it
        else:
            self._kind = KINDS[(KINDS.index(self._kind) + 1) % len(KINDS)]
            view.as_text()
            self.select(row, ask=True)
        self._screen.refresh_keys()

    def leave(self) -> bool:
        """Ends the comparison; False if there was none."""
        was_comparing, self._kind = bool(self._kind), KINDS[0]
        self.select(None)
        self._screen.refresh_keys()
        return was_comparing

    def select(self, row: SampleRow | None, *, ask: bool = False) -> None:
        """Compares another sample; `ask`: asks the reference if it has no response yet."""
        self._others, self._preferences, self._index, self._known = [], [], 0, False
        key = key_of(row) if row is not None else None
        self._ask_reference = ask or (self._ask_reference and key == self._shown)
        self._shown = key
        self._show()
        if row is not None and self._kind:
            self._read(row)

    def read_again(self) -> None:
        """Reads the other responses again: their labels may have changed."""
        row = self._selected()
        if row is not None and self._kind:
            self._read(row)

    def _read(self, row: SampleRow) -> None:
        session = self._context.session
        if session is not None:
            read = functools.partial(_read_others, session, row, self._kind)
            self._screen.read_in_thread("comparison", read)

    def take(self, message: ComparisonRead) -> None:
        """Takes the responses that were read; the displayed one stays."""
        row = self._selected()
        asked = (message.key, message.kind)
        if row is None or (key_of(row), self._kind) != asked or self._labels.unwritten:
            return
        shown = self._others[self._index] if self._others else None
        self._others, self._preferences, self._known = message.others, message.preferences, True
        same = (i for i, other in enumerate(self._others) if _same(other, shown))
        self._index = next(same, -1)
        if self._index < 0:
            # The next key may judge the pair that is shown: it stays, whatever was probed since.
            self._others = [shown, *self._others] if shown is not None else self._others
            self._index = 0
        ask, self._ask_reference = self._ask_reference, False
        if ask and self._kind == "reference" and not self._others and self._may_ask(row):
            self._ask(row.prompt)
        self._show()

    def show_other(self, by: int) -> None:
        """Shows another one of the earlier responses."""
        self._index = min(max(self._index + by, 0), max(len(self._others) - 1, 0))
        self._show()

    def _show(self) -> None:
        row, view = self._selected(), self._view
        if row is None or not self._kind:
            view.compare(None)
            return
        if not self._others:
            title = "REFERENCE" if self._kind == "reference" else "OTHERS"
            view.compare(ComparisonTarget(self._kind, title, row, missing=self._why_missing(row)))
            return
        other = self._others[self._index]
        if isinstance(other, ProbeResponse):
            title = f"REFERENCE, asked at step {other.step}"
        else:
            count = len(self._others)
            title = f"OTHER, step {other.step} #{other.index}"
            title += f" of attempt {other.attempt}" * other.left
            title += f" ({self._index + 1}/{count}{'+' * (count == MAX_COMPARED)})"
        better, who = self._preferred(row.response, other.response)
        view.compare(ComparisonTarget(self._kind, title, row, other, better=better, who=who))

    # -- the reference -------------------------------------------------------------------------

    def _why_missing(self, row: SampleRow) -> str:
        state = self._context.state
        if row.prompt in self._probed:
            return "probe sent; the response comes after the current step"
        if not self._known:
            return "reading …"
        if self._kind == "earlier":
            return "no other response to this prompt up to this step; press d for the reference"
        if self._may_ask(row):
            return "no reference response yet; press d"
        if not self._context.steers:
            return "no reference response yet, and this terminal is read-only"
        resume = state.command("resume", state.name)
        return f"no reference response yet; resume the run first:\n{resume}"

    def _may_ask(self, row: SampleRow) -> bool:
        session = self._context.session
        live = session is not None and session.may_be_live() and self._context.steers
        return live and row.prompt not in self._probed

    def _ask(self, prompt: str) -> None:
        target = self._screen.steering_target()
        if target is not None and self._context.commands.send(
            target, Probe(text=prompt), "probe with this prompt", self._screen.post_message
        ):
            self._probed.add(prompt)
            self._show()

    def take_reply(self, message: CommandAnswered) -> None:
        """Shows the reference's response to a probe; the app shows any other reply."""
        reply, command = message.reply, message.command
        if not isinstance(command, Probe) or (reply is not None and not reply.final):
            return
        if message.session != self._context.session:
            return  # another session was opened meanwhile
        self._probed.discard(command.text)
        row = self._selected()
        if reply is not None and reply.result:
            message.stop()
            self._context.say("the reference has responded")
            asked = row is not None and row.prompt == command.text and self._kind == "reference"
            if asked and not self._others:
                found = ProbeResult.of(reply.result).reference
                self._others = [msgspec.structs.replace(found, step=reply.step)]
                self._known = True
        self._show()

    # -- preferences ---------------------------------------------------------------------------

    def toggle_preference(self, which: str) -> None:
        """Prefers `this` or the `other` response, or removes that preference if it is set."""
        row = self._selected()
        if row is not None and self._kind and key_of(row) != self._shown:
            self.select(row)  # the key came before the others of this sample were read
        if row is None or not self._others or not self._view.comparing:
            if not self._known:
                why = "the other response is still loading; then press y or o"
            elif self._others:
                why = "press d to show both responses, then y or o"
            else:
                why = "there is no other response to compare with"
            self._context.say(why)
            return
        other, prompt, who = self._others[self._index], row.prompt, self._context.who
        mine, theirs = Response.of(row), _response(other)
        if self._preferred(mine.response, theirs.response)[0] == which:
            self._labels.write(lambda session: forget_preference(session, prompt, mine, theirs))
            added: list[Preference] = []
        else:
            chosen, rejected = (mine, theirs) if which == "this" else (theirs, mine)
            self._labels.write(lambda session: prefer(session, prompt, chosen, rejected, who))
            now = self._context.now()
            added = [Preference(prompt=prompt, chosen=chosen, rejected=rejected, who=who, time=now)]
        pair = {mine.response, theirs.response}
        if len(pair) == 2:  # two equal responses: the write fails and reports it
            self._preferences = [*(p for p in self._preferences if _pair(p) != pair), *added]
        self._show()

    def _preferred(self, mine: str, theirs: str) -> tuple[str, str]:
        """The preferred response, `this` or `other`, and by whom; empty without a preference."""
        for preference in self._preferences:
            if _pair(preference) == {mine, theirs}:
                which = "this" if preference.chosen.response == mine else "other"
                return which, preference.who
        return "", ""


def _read_others(session: SessionFolder, row: SampleRow, kind: str) -> ComparisonRead:
    """Reads the journal, in a worker thread."""
    with JournalReader(session) as reader, LabelReader(session) as labels:
        others: list[Other] = []
        if kind == "earlier":
            others += reader.samples.earlier(row)
        elif (found := reader.last_reference_probe(row.prompt)) is not None:
            others.append(found)
        return ComparisonRead(key_of(row), kind, others, labels.preferences(row.prompt))


def _pair(preference: Preference) -> set[str]:
    return {preference.chosen.response, preference.rejected.response}


def _response(other: Other) -> Response:
    """A response as a preference stores it; those of the reference have no step and index."""
    if isinstance(other, SampleRow):
        return Response.of(other)
    return Response(response=other.response)


def _same(one: Other, other: Other | None) -> bool:
    if isinstance(one, SampleRow) and isinstance(other, SampleRow):
        return key_of(one) == key_of(other)
    return type(one) is type(other) and other is not None and one.step == other.step
