"""A line to type in, and keys that take effect in the order in which they were typed.

Textual carries out the key of a binding only when it has gone up through all parents, each with a
queue of its own; letters it takes at once. In a burst, which is what a slow connection makes of
quick typing, a backspace would come after the letters that follow it, and what was typed for a
dialog would go, letter by letter, to the screen it was opened on.
"""

from textual import events
from textual.widgets import Input


class TextInput(Input):
    """An input that carries out its own keys at once; its cursor stands still, as all else does."""

    def on_mount(self) -> None:
        """Blinking would be sent over the wire twice a second."""
        self.cursor_blink = False

    async def _on_key(self, event: events.Key) -> None:
        await super()._on_key(event)
        for binding in self._bindings.key_to_bindings.get(event.key, ()):
            if not event.is_printable and await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return
