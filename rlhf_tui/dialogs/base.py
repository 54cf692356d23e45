"""Dialogs: a question with choices, and an input field."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from msgspec import Struct
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen, Screen

from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Lines, Row
from rlhf_tui.widgets.textual_internals import screens_of_current_mode
from rlhf_tui.widgets.wrap import wrap_row

if TYPE_CHECKING:  # Textual imports each widget when it is first used: start-up stays short
    from textual.widgets import Button, Input


REFRESH_INTERVAL = 0.5
"""Seconds between two readings of a text that changes while its dialog is open."""
MARGIN, WIDEST = 4, 84
"""Width of border and padding, and the greatest width of a dialog (app.tcss)."""
BUTTON_MARGIN = 2
"""Width of the margin between two buttons (app.tcss)."""


def text_width(terminal: int) -> int:
    """Cells of a line of text in a dialog, in a terminal that is `terminal` columns wide."""
    return max(min(terminal * 9 // 10, WIDEST) - MARGIN, 10)


class MessageLine(Lines):
    """Lines of a dialog, broken between words. Its height is the number of lines."""

    def __init__(self, rows: list[Row], *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._given = rows
        self.say(rows)

    def say(self, rows: list[Row]) -> None:
        """Replaces the lines, and changes the height with them."""
        self._given = rows
        width = text_width(self.app.size.width)
        broken = [line for row in rows for line in wrap_row(row, width)]
        self.styles.height = max(len(broken), 1)
        self.show(broken)

    def on_resize(self) -> None:
        """Breaks the lines for the new width."""
        self.say(self._given)
        super().on_resize()


Result = TypeVar("Result")


def is_on_top(screen: Screen[Any]) -> bool:
    """Whether a screen is the one that receives the keys.

    `Screen.dismiss` removes whichever screen is on top. Dismissing a screen twice, by keys typed
    ahead, would also remove the one below it, and removing the last one ends the app.
    """
    return screens_of_current_mode(screen.app)[-1:] == [screen]


class Dialog(ModalScreen[Result | None]):
    """A box over the screen; escape closes it without a result."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "cancel", show=False)]

    def __init__(self, title: str) -> None:
        super().__init__()
        self.heading = title

    def compose(self) -> ComposeResult:
        """The box with its title and its body."""
        with Vertical(classes="dialog") as box:
            box.border_title = Text(one_line(self.heading))
            yield from self.body()

    def body(self) -> ComposeResult:
        """The widgets in the box; overridden."""
        yield from ()

    def close_with(self, result: Result | None) -> None:
        """Closes with a result. A dialog that stays open after a choice overrides it."""
        self.dismiss(result)

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """Removes the dialog. Later calls do nothing: a second key may be queued already."""
        return super().dismiss(result) if is_on_top(self) else AwaitComplete()

    def action_cancel(self) -> None:
        """Closes without a result."""
        self.close_with(None)


class Choice(Struct, frozen=True):
    """A choice of a :class:`ChoiceDialog`."""

    key: str
    label: str
    result: str
    danger: bool = False


class ChoiceDialog(Dialog[str]):
    """A question with a button for each choice. The first one must be safe: it has the focus."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,up,k", "app.focus_previous", show=False),
        Binding("right,down,j", "app.focus_next", show=False),
    ]

    def __init__(
        self, title: str, rows: list[Row] | Callable[[], list[Row]], choices: list[Choice]
    ) -> None:
        """A dialog with a button and a key for each choice.

        Args:
            title: on the border.
            rows: the text; a function if it changes while the dialog is open.
            choices: the first one must be safe.
        """
        super().__init__(title)
        self._rows = rows
        self.choices = choices

    def body(self) -> ComposeResult:
        """The text and the buttons."""
        from textual.widgets import Button  # noqa: PLC0415 - keeps the start quick

        yield MessageLine(self._rows() if callable(self._rows) else self._rows)
        with Horizontal(classes="answers"):
            for choice in self.choices:
                label = Text(f"{choice.label} [{choice.key}]")
                yield Button(
                    label, id=f"answer-{choice.result}", compact=True,
                    variant="error" if choice.danger else "default",
                )  # fmt: skip

    def on_mount(self) -> None:
        """Lets a text that changes do so."""
        if callable(rows := self._rows):
            self.set_interval(REFRESH_INTERVAL, lambda: self.say(rows()))

    def on_resize(self) -> None:
        """Puts the buttons below each other if they do not fit beside each other."""
        self.call_after_refresh(self._stack)

    def _stack(self) -> None:
        for answers in self.query(".answers"):
            needed = (
                sum(button.outer_size.width + BUTTON_MARGIN for button in answers.children)
                - BUTTON_MARGIN
            )
            answers.set_class(needed > answers.size.width, "stacked")

    def say(self, rows: list[Row]) -> None:
        """Replaces the text; does nothing while the dialog is being closed."""
        for line in self.query(MessageLine):
            line.say(rows)

    def on_button_pressed(self, event: "Button.Pressed") -> None:
        """Closes with the choice of a button."""
        self.close_with((event.button.id or "").removeprefix("answer-"))

    def on_key(self, event: events.Key) -> None:
        """Closes with the choice of a key."""
        result = next((c.result for c in self.choices if c.key == event.character), None)
        if result is not None:
            event.stop()
            self.close_with(result)


Check = Callable[[str], tuple[bool, str]]


class InputDialog(Dialog[str]):
    """An input field, and below it the effect of the typed value."""

    def __init__(
        self,
        title: str,
        rows: list[Row],
        value: str = "",
        check: Check | None = None,
        *,
        verb: str,
        multiline: bool = False,
    ) -> None:
        """A dialog for one value.

        Args:
            title: on the border.
            rows: text above the field.
            value: the initial text of the field.
            check: returns whether a text is valid, and its effect or what is wrong with it.
            verb: what enter does.
            multiline: whether the value may have line breaks, which are shown as `↵`.
        """
        super().__init__(title)
        self.rows = rows
        self.value = value
        self.check = check
        self.verb = verb
        self.multiline = multiline

    def body(self) -> ComposeResult:
        """The text, the field, the effect of the value, the keys."""
        from rlhf_tui.widgets.text_input import (  # noqa: PLC0415 - keeps the start quick
            LINE_BREAK,
            TextInput,
        )

        yield MessageLine(self.rows)
        field = TextInput(one_line(self.value), id="field", compact=True, select_on_focus=True)
        if self.multiline:
            field.line_break = LINE_BREAK
        yield field
        yield MessageLine([[]], id="effect")
        breaks = f" · {LINE_BREAK} line break" if self.multiline else ""
        yield MessageLine([[(f"enter {self.verb} · esc cancel{breaks}", "dim")]])

    def on_mount(self) -> None:
        """Gives the focus to the field."""
        self.set_focus(self.query_one("#field"))
        self._show_effect(self.value)

    def on_input_changed(self, event: "Input.Changed") -> None:
        """Shows the effect of the typed value."""
        self._show_effect(event.value)

    def _show_effect(self, text: str) -> bool:
        valid, effect = self.check(text) if self.check else (bool(text.strip()), "")
        self.query_one("#effect", MessageLine).say([[(effect, "dim" if valid else "warn")]])
        return valid

    def on_input_submitted(self, event: "Input.Submitted") -> None:
        """Closes with the value if it is valid."""
        from rlhf_tui.widgets.text_input import LINE_BREAK  # noqa: PLC0415 - keeps the start quick

        if self._show_effect(event.value):
            text = event.value.strip()
            self.close_with(text.replace(LINE_BREAK, "\n") if self.multiline else text)
