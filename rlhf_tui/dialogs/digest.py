"""The dialog with what happened since the operator last saw the session."""

from rlhf_tui.dialogs.base import Choice, ChoiceDialog
from rlhf_tui.widgets.lines import Row

OWN_KEYS = ("enter", "space", "escape", "o", "tab", "shift+tab")


class DigestDialog(ChoiceDialog):
    """Shows the digest. It opens by itself, so it must not take keys meant for the screen.

    :data:`OWN_KEYS` close it or move in it. The app closes it before it handles any other key.
    """

    def __init__(self, title: str, rows: list[Row]) -> None:
        keys: Row = [("any other key closes this and acts on the screen", "dim")]
        super().__init__(title, [*rows, [], keys], [Choice("o", "OK", "ok")])
