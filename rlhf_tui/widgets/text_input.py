"""An input field whose keys take effect in the order in which they were typed.

Textual runs the binding of a key only after the event has gone up through all parents, each with a
queue of its own, but inserts letters at once. In a burst, which is what a slow connection makes of
quick typing, a backspace would come after the letters that follow it.
"""

from textual import events
from textual.widgets import Input

from rlhf_tui.widgets.textual_internals import bindings_of_key


class TextInput(Input):
    """An input that runs its own bindings at once. Its cursor does not blink."""

    def on_mount(self) -> None:
        """A blinking cursor would be sent over the wire twice a second."""
        self.cursor_blink = False

    async def on_key(self, event: events.Key) -> None:
        """Runs the binding of a key; Textual inserts what is printable after this."""
        if event.is_printable:
            return
        for binding in bindings_of_key(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return
