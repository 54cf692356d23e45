"""Keys that take effect in the order in which they were typed."""

from textual import events
from textual.app import App
from textual.widgets import Input


class SequentialKeys(App[None], inherit_bindings=False):
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
