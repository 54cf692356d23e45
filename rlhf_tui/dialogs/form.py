"""A dialog with several input fields, checked together while they are typed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from msgspec import Struct
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from rlhf_tui.dialogs.base import Dialog, MessageLine, text_width
from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.wrap import wrap

if TYPE_CHECKING:  # Textual imports each widget when it is first used: start-up stays short
    from textual.suggester import Suggester
    from textual.widgets import Input

MAX_LINES = 4
"""Lines of the effect."""
Values = dict[str, str]
"""Field → typed text, without surrounding spaces."""
Verdict = Literal["valid", "incomplete", "wrong"]
FormCheck = Callable[[Values], tuple[Verdict, str]]


class Field(Struct, frozen=True):
    """An input field of a :class:`FormDialog`."""

    key: str
    label: str
    value: str = ""
    hint: str = ""
    """Shown while the field is empty."""
    suggester: "Suggester | None" = None


class FormDialog(Dialog[Values]):
    """Input fields, and below them the effect of the typed values, or what is wrong with them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    def __init__(
        self, title: str, rows: list[Row], fields: list[Field], check: FormCheck, verb: str
    ) -> None:
        """A form.

        Args:
            title: on the border.
            rows: text above the fields.
            fields: the first one has the focus.
            check: returns whether the values are valid, and their effect, what is still to be
                typed, or what is wrong.
            verb: what enter does.
        """
        super().__init__(title)
        self.rows = rows
        self.fields = fields
        self.check = check
        self.verb = verb

    def body(self) -> ComposeResult:
        """The text, the fields with their labels, the effect of the values, the keys."""
        from rlhf_tui.widgets.completing_input import CompletingInput  # noqa: PLC0415 - start-up

        yield MessageLine(self.rows)
        for field in self.fields:
            yield MessageLine([[], [(field.label, "dim")]])
            yield CompletingInput(
                one_line(field.value), placeholder=one_line(field.hint), id=field.key,
                suggester=field.suggester, compact=True, select_on_focus=False,
            )  # fmt: skip
        yield MessageLine([[]], id="effect")
        keys = f"enter {self.verb} · tab complete · ↓ ↑ field · esc cancel"
        yield MessageLine([[(keys, "dim")]])

    def values(self) -> Values:
        """The typed values."""
        from textual.widgets import Input  # noqa: PLC0415 - keeps the start quick

        return {f.key: self.query_one(f"#{f.key}", Input).value.strip() for f in self.fields}

    def on_mount(self) -> None:
        """Gives the focus to the first field; typing replaces its text."""
        from textual.widgets import Input  # noqa: PLC0415 - keeps the start quick

        first = self.query_one(f"#{self.fields[0].key}", Input)
        self.set_focus(first)
        first.select_all()
        self._show_effect()

    def on_input_changed(self) -> None:
        """Shows the effect of the typed values."""
        self._show_effect()

    def _show_effect(self, *, submitted: bool = False) -> bool:
        verdict, effect = self.check(self.values())
        valid = verdict == "valid"
        tone = "warn" if verdict == "wrong" or (submitted and not valid) else "dim"
        rows: list[Row] = [[(x, tone)] for x in wrap(effect, text_width(self.app.size.width))]
        self.query_one("#effect", MessageLine).say(rows[:MAX_LINES] or [[]])
        return valid

    def on_input_submitted(self, event: "Input.Submitted") -> None:
        """Closes with the values if they are valid: enter in any field."""
        event.stop()
        if self._show_effect(submitted=True):
            self.close_with(self.values())
