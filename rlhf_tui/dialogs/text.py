"""Dialogs that only tell: lines which scroll where they are more than fit."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from engine.journal.rows import ProbeResult
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import Dialog, MessageLine
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.table import ScrollText
from rlhf_tui.widgets.wrap import wrap

FRAME = 6
"""Rows of a terminal that a dialog leaves to what is not its text."""
MARGIN, WIDEST = 4, 84
"""Cells of a dialog's border and padding, and of the widest one (app.tcss)."""


class TextDialog(Dialog):
    """The usual keys scroll, and esc, q or enter closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,enter", "cancel", "close", show=False)]
    HINT = "esc close"

    def __init__(self, title: str) -> None:
        """Under a title; :meth:`lines` says what stands there."""
        super().__init__(title)
        self._lines: list[Row] = []

    def lines(self) -> list[Row]:
        """What is told; overridden."""
        return []

    @property
    def width(self) -> int:
        """Cells of a line."""
        return max(min(self.app.size.width * 9 // 10, WIDEST) - MARGIN, 10)

    def body(self) -> ComposeResult:
        """The lines, and the keys below them."""
        self._lines = self.lines()
        texts = ScrollText(id="told")
        texts.styles.height = self._height()
        yield texts
        more = "↓ ↑ more · " if len(self._lines) > self._height() else ""
        yield MessageLine([[(more + self.HINT, "dim")]])

    def _height(self) -> int:
        return min(len(self._lines), max(self.app.size.height - FRAME, 1))

    def on_mount(self) -> None:
        """The lines scroll by the usual keys."""
        texts = self.query_one(ScrollText)
        texts.set_body(self._lines)
        texts.focus()

    def on_resize(self) -> None:
        """No higher than the terminal, so that all can still be reached."""
        for texts in self.query(ScrollText):
            texts.styles.height = self._height()


class ProbeDialog(TextDialog):
    """What the policy and the reference answered to a probe."""

    def __init__(self, result: ProbeResult) -> None:
        super().__init__("Probe")
        self._result = result

    def lines(self) -> list[Row]:
        """One answer below the other, with its numbers."""
        rows: list[Row] = []
        result = self._result
        for name, found in (("policy", result.policy), ("reference", result.reference)):
            score, kl = fmt.number(found.score), fmt.number(found.kl, 2)
            rows += [[], [(f"{name}  ", "strong"), (f"score {score}  KL {kl}", "dim")]]
            rows += [[(x, "")] for x in wrap(found.response, self.width)]
        return rows[1:]
