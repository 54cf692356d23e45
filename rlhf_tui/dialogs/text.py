"""Dialogs with text, which scrolls if it is higher than the terminal."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from engine.journal.rows import ProbeResult
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import Dialog, MessageLine, text_width
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.samples.turns import response_rows
from rlhf_tui.widgets.scroll_list import ScrollText
from rlhf_tui.widgets.wrap import wrap

FRAME_ROWS = 6
"""Rows of the terminal that a dialog does not use for its text."""


class TextDialog(Dialog[str]):
    """Text in a box. The keys of a list scroll it; escape, q and enter close it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,enter", "cancel", "close", show=False)]
    HINT = "esc close"

    def __init__(self, title: str) -> None:
        """`title` is shown on the border; :meth:`lines` returns the text."""
        super().__init__(title)
        self._lines: list[Row] = []

    def lines(self) -> list[Row]:
        """The text; overridden."""
        return []

    @property
    def width(self) -> int:
        """Cells that a line can use."""
        return text_width(self.app.size.width)

    def body(self) -> ComposeResult:
        """The lines, and the keys below them."""
        self._lines = self.lines()
        texts = ScrollText(id="text")
        texts.styles.height = self._height()
        yield texts
        more = "↓ ↑ more · " if len(self._lines) > self._height() else ""
        yield MessageLine([[(more + self.HINT, "dim")]])

    def _height(self) -> int:
        return min(len(self._lines), max(self.app.size.height - FRAME_ROWS, 1))

    def on_mount(self) -> None:
        """Gives the focus to the text."""
        texts = self.query_one(ScrollText)
        texts.set_body(self._lines)
        texts.focus()

    def on_resize(self) -> None:
        """Keeps the dialog within the terminal, so that every line can be reached."""
        for texts in self.query(ScrollText):
            texts.styles.height = self._height()


class ProbeDialog(TextDialog):
    """The responses of the policy and of the reference to a probe."""

    def __init__(self, session: str, prompt: str, result: ProbeResult, step: int | None) -> None:
        """For a run.

        Args:
            session: its name.
            prompt: of the probe.
            result: the responses of both models.
            step: the step after which the probe ran; None if unknown.
        """
        super().__init__(f"Probe of {session}" + (f" at step {step}" if step is not None else ""))
        self._prompt = prompt
        self._result = result

    def lines(self) -> list[Row]:
        """The prompt, then one response below the other, each with its numbers."""
        rows: list[Row] = [[("PROMPT", "dim")]]
        rows += [[(x, "dim")] for x in wrap(self._prompt, self.width)]
        result = self._result
        for name, found in (("policy", result.policy), ("reference", result.reference)):
            numbers = f"score {fmt.number(found.score)}"
            if found is result.policy:  # the reference's KL to itself is a rounding error
                numbers += f"  KL {fmt.number(found.kl, 2)}"
            rows += [[], [(f"{name}  ", "strong"), (numbers, "dim")]]
            rows += response_rows(found.response, found.replies, self.width)
        if unscored := result.policy.unscored or result.reference.unscored:
            rows += [[], *([(x, "dim")] for x in wrap(f"no score: {unscored}", self.width))]
        return rows
