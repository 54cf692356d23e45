"""The help: every key that does something on this screen, made from the bindings."""

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen

from rlhf_tui.screens.dialogs import Dialog, Said
from rlhf_tui.widgets.keys import key_name
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.listing import Texts

LEFT_OUT = ("screen.copy_text", "help_quit", "command_palette")
"""Textual's own, which do not work here or stand below the list."""
WORDS = {"app.focus_next": "next panel", "app.focus_previous": "panel before"}


class Help(Dialog):
    """Keys in groups: the widget that has the focus, the screen, everywhere."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,q,enter", "cancel", "close", show=False)
    ]

    def __init__(self, screen: Screen[Any]) -> None:
        """Of the screen it was asked on, read now: on top of it the bindings are others."""
        super().__init__("Keys")
        self._lines = help_rows(screen)

    def body(self) -> ComposeResult:
        """The list; it scrolls where it is longer than the terminal."""
        texts = Texts(id="help")
        texts.styles.height = len(self._lines)
        yield texts
        yield Said([[("esc close · ctrl+p all commands by name", "dim")]])

    def on_mount(self) -> None:
        """The list scrolls by the usual keys."""
        texts = self.query_one(Texts)
        texts.set_body(self._lines)
        texts.focus()


def help_rows(screen: Screen[Any]) -> list[Row]:
    """A line for each action, with all its keys."""
    groups: dict[str, dict[str, tuple[list[str], str]]] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.description or not active.enabled or binding.action in LEFT_OUT:
            continue
        here = "Everywhere" if active.node is screen.app else "Here"
        if active.node is not screen and here == "Here":
            here = "In this list" if hasattr(active.node, "count") else "Here"
        keys, _ = groups.setdefault(here, {}).setdefault(
            binding.action, ([], WORDS.get(binding.action, binding.description))
        )
        name = binding.key_display or key_name(binding.key)
        if name not in keys:
            keys.append(name)
    rows: list[Row] = []
    for group in ("Here", "In this list", "Everywhere"):
        if group in groups:
            rows += [[]] if rows else []
            rows.append([(group, "strong")])
            rows += [
                [(f"  {' '.join(keys):<14}", "key"), (words, "")]
                for keys, words in groups[group].values()
            ]
    return rows
