"""The command palette as a dialog."""

from textual.await_complete import AwaitComplete
from textual.command import CommandPalette

from rlhf_tui.dialogs.base import is_on_top


class PaletteDialog(CommandPalette):
    """Textual's palette; enter typed several times selects one command and closes it once."""

    def dismiss(self, result: None = None) -> AwaitComplete:
        """Closes the palette. Later calls do nothing."""
        return super().dismiss(result) if is_on_top(self) else AwaitComplete()
