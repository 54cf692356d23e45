"""An input field whose keys take effect in the order in which they were typed.

Textual inserts letters immediately, but runs the binding of a key only after the event has passed
the message queues of all parents. On a slow connection keys arrive in bursts, and a backspace would
take effect after the letters that follow it.
"""

from rich.highlighter import Highlighter
from rich.text import Text
from textual import events
from textual.widgets import Input

from rlhf_tui.text import with_symbols
from rlhf_tui.widgets.textual_internals import bindings_of_key

LINE_BREAK = "↵"
"""Stands for a line break in an input whose text may have several lines."""


class _VisibleControls(Highlighter):
    """Draws control characters as symbols."""

    def highlight(self, text: Text) -> None:
        """Replaces them in the text that is drawn."""
        text.plain = with_symbols(text.plain)


class TextInput(Input):
    """An input that runs its own bindings immediately and takes all lines of what is pasted."""

    line_break = " "
    """Joins pasted lines."""

    def on_mount(self) -> None:
        """Turns off the blinking cursor, which would send data twice a second.

        What was pasted may have control characters. They stay in the value, but are not drawn.
        """
        self.cursor_blink = False
        self.highlighter = _VisibleControls()

    async def on_key(self, event: events.Key) -> None:
        """Runs the binding of a key that is not printable. Textual inserts printable ones."""
        if event.is_printable:
            return
        for binding in bindings_of_key(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return

    def on_paste(self, event: events.Paste) -> None:
        """Inserts pasted lines as one. Textual would drop all but the first."""
        event.prevent_default()
        event.stop()
        text = self.line_break.join(event.text.strip("\r\n").splitlines())
        if text:
            self.replace(text, *sorted(self.selection))
