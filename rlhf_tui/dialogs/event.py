"""The dialog with all that is known of an event."""

from typing import ClassVar

import msgspec
from msgspec import Struct
from textual.binding import Binding, BindingType

from engine.examined import examined
from engine.journal.rows import AlertEvent, CheckpointEvent, ErrorEvent
from engine.metrics import title_of
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.text import TextDialog
from rlhf_tui.state.curves import RECENT_STEPS
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import Marker
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.cursor import MEASURED
from rlhf_tui.widgets.samples.turns import response_rows
from rlhf_tui.widgets.wrap import wrap

KINDS = {
    "command": "Intervention", "checkpoint": "Checkpoint", "attempt": "Start", "alert": "Alert",
    "note": "Note", "crash": "Failure", "end": "End",
}  # fmt: skip
"""Kind of a marker → its name in the title."""
WINDOW_SHOWN = 10


class EvidenceSample(Struct, frozen=True, kw_only=True):
    """A response that explains an alert, as the guard rail recorded it."""

    index: int = 0
    prompt: str = ""
    response: str = ""
    score: float | None = None
    kl: float | None = None
    length: int | None = None
    replies: list[tuple[int, int]] = []


class Evidence(Struct, frozen=True, kw_only=True):
    """The additional keys of an alert."""

    metric: str = ""
    window: list[float | None] = []
    """The metric's values before the alert, oldest first."""
    samples: list[EvidenceSample] = []
    """The step's responses that explain it best."""
    traceback: str | None = None
    advice: str = ""
    """What to do, in one line."""
    from_step: int | None = None
    """The first step of the stretch in which the metric was beyond its limit."""


class EventDialog(TextDialog):
    """The whole text of an event, with an alert's samples. The result is -1 or 1 for N and n."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "leave('1')", "next event", show=False),
        Binding("N", "leave('-1')", "previous event", show=False),
    ]
    HINT = "n N next, previous event · esc close"

    def __init__(self, state: SessionState, marker: Marker) -> None:
        """`state` is that of the run in which `marker` happened."""
        super().__init__(f"{KINDS[marker.kind]} at step {marker.step} of {state.name}")
        self._state = state
        self._marker = marker

    def action_leave(self, way: str) -> None:
        """Moves to the next or the previous event."""
        self.close_with(way)

    def lines(self) -> list[Row]:
        """The text, the time and the sender, then the details of its kind."""
        marker = self._marker
        rows: list[Row] = [[(line, "strong")] for line in wrap(marker.text, self.width)]
        facts = [fmt.clock(marker.time)] if marker.time else []
        facts += [f"attempt {marker.event.attempt}"] if marker.event is not None else []
        facts += [f"by {marker.who}"] if marker.who else []
        if marker.event is not None and isinstance(marker.event.payload, AlertEvent):
            facts.append(f"action: {marker.event.payload.action}")
        facts += ["on an abandoned branch"] if marker.abandoned else []
        rows += self._wrapped(" · ".join(facts), "dim")
        if marker.kind == "command" and not marker.abandoned:
            rows += self._effect()
        if marker.event is not None:
            match marker.event.payload:
                case AlertEvent(text=text):
                    if text not in marker.text:  # the first line has a shorter one, if there is one
                        rows += [[], *self._wrapped(text, "")]
                    rows += self._evidence(marker.event.data)
                case CheckpointEvent(size=size):
                    rows.append([(fmt.size(size), "dim")])
                case ErrorEvent(text=text, traceback=traceback):
                    more = text.partition("\n")[2]
                    rows += self._block("", more) + self._block("traceback", traceback or "")
        return rows

    def _effect(self) -> list[Row]:
        rows: list[Row] = [[], [(f"means of {RECENT_STEPS} steps before → after", "dim")]]
        for name, label in MEASURED:
            before, after = self._state.curves.before_and_after(name, self._marker.step)
            rows.append(
                [(f"  {label:<7}", "dim"), (f"{fmt.number(before)} → {fmt.number(after)}", "")]
            )
        return rows

    def _evidence(self, data: str) -> list[Row]:
        try:
            found = msgspec.json.decode(data, type=examined(Evidence))
        except msgspec.DecodeError:  # the keys of another version's rule
            return []
        rows = self._block("traceback", found.traceback or "")
        if found.advice:
            rows += [[], *self._wrapped(f"→ {found.advice}", "key")]
        if found.from_step is not None:
            steps = f"steps {found.from_step} to {self._marker.step}"
            rows += self._wrapped(f"seen in {steps}", "dim")
        if found.window:
            values = "  ".join(fmt.number(v) for v in found.window[-WINDOW_SHOWN:])
            rows += [[], *self._wrapped(f"{title_of(found.metric)} before it: {values}", "dim")]
        for sample in found.samples:
            numbers = f"score {fmt.number(sample.score)}  KL {fmt.number(sample.kl, 2)}"
            numbers += f"  {fmt.plural(sample.length, 'token')}" if sample.length else ""
            rows += [[], [(f"response {sample.index}  ", "accent"), (numbers, "dim")]]
            rows += self._wrapped(sample.prompt, "dim")
            rows += response_rows(sample.response, sample.replies, self.width)
        return rows

    def _block(self, title: str, text: str) -> list[Row]:
        if not text.strip():
            return []
        head: list[Row] = [[(title, "dim")]] if title else []
        return [[], *head, *self._wrapped(text.rstrip(), "")]

    def _wrapped(self, text: str, tone: str) -> list[Row]:
        return [[(line, tone)] for line in wrap(text, self.width)] if text else []
