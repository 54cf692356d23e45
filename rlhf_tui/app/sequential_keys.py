"""Handles keys in the order in which they are typed."""

from textual import events
from textual.app import App
from textual.widgets import Input

from rlhf_tui.widgets.textual_internals import run_key_binding, wait_until_mounted


class SequentialKeys(App[None], inherit_bindings=False):
    """An app that finishes one key before it handles the next.

    Textual lets a key event travel through the queues of all parents before its binding runs. Keys
    typed ahead then reach the screen on which a dialog is about to open, not the dialog.
    """

    async def on_event(self, event: events.Event) -> None:
        """Runs the binding of a key at once, unless an input field has the focus."""
        if (
            not isinstance(event, events.Key)
            or event.is_forwarded
            or isinstance(self.focused, Input)
            or not await self._run_key(event.key)
        ):
            await super().on_event(event)

    async def _run_key(self, key: str) -> bool:
        """Runs the binding of a key and waits for the screen it opens; False without a binding."""
        await self.wait_until_ready(key)
        done = await run_key_binding(self, key)
        if done:
            await wait_until_mounted(self.screen)
        return done

    async def wait_until_ready(self, key: str) -> None:
        """Waits until a key can act on what the screen shows; overridden."""
