"""A line to type in, and keys that take effect in the order in which they were typed.

Textual carries out the key of a binding only when it has gone up through all parents, each with a
queue of its own; letters it takes at once. In a burst, which is what a slow connection makes of
quick typing, a backspace would come after the letters that follow it, and what was typed for a
dialog would go, letter by letter, to the screen it was opened on.
"""

from textual import events
from textual.app import App
from textual.widgets import Input


class Field(Input):
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


class InOrder(App[None], inherit_bindings=False):
    """An app that carries out a key before it looks at the next one."""

    async def on_event(self, event: events.Event) -> None:
        """A key outside a field is carried out here and now, with the dialog it may open."""
        if (
            not isinstance(event, events.Key)
            or event.is_forwarded
            or isinstance(self.focused, Input)
            or not await self._carry_out(event.key)
        ):
            await super().on_event(event)

    async def _carry_out(self, key: str) -> bool:
        """Whether something is bound to a key; waits for the screen it opens."""
        done = await self._check_bindings(key, priority=True) or await self._check_bindings(key)
        if done:
            await self.screen._mounted_event.wait()
        return done
