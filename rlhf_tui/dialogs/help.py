"""The help: every key of a screen, made from the bindings."""

from itertools import zip_longest
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.screen import Screen

from rlhf_tui.dialogs.text import TextDialog
from rlhf_tui.widgets.key_footer import key_name
from rlhf_tui.widgets.lines import Row, row_width

HIDDEN_ACTIONS = ("screen.copy_text", "help_quit", "command_palette")
"""Actions of Textual that do not work here, and the palette, which lists of keys name elsewhere."""
PANEL_ACTIONS = ("app.focus_next", "app.focus_previous")
"""Actions that do nothing on a screen with one panel."""
WIDE, COLUMN = 100, 45
"""Terminal width from which on the help has two columns, and the width of the first one."""
DESCRIPTIONS = {
    "app.focus_next": "next panel",
    "app.focus_previous": "previous panel",
    "steer('pause')": "pause after this step",
    "steer('beta')": "set beta",
    "steer('adaptive')": "adaptive/fixed beta",
    "steer('undo')": "undo the last change",
    "steer('change')": "set another setting",
    "steer('save')": "save a checkpoint",
    "steer('note')": "add a note",
    "steer('probe')": "probe with a prompt",
    "steer('stop')": "stop the run",
    "theme": "next theme",
    "new": "start a demo run",
    "new_from_file": "run a configuration file",
    "resume": "resume from last checkpoint",
    "fork": "fork a new session",
    "delete": "delete with checkpoints",
    "sort": "sort by the next column",
    "reverse": "reverse the order",
    "mark_session": "mark, for O and C",
    "metric": "choose the listed metric",
    "roll_back": "roll back to a checkpoint",
    "delete_checkpoint": "delete the checkpoint",
    "export": "export as a model folder",
    "label('good')": "label good",
    "label('bad')": "label bad",
    "label('hack')": "label as reward hacking",
    "compare": "compare: earlier, reference",
    "other(-1)": "compare with a newer one",
    "other(1)": "compare with an older one",
    "other(-200)": "compare with the newest",
    "other(200)": "compare with the oldest",
    "filter": "filter by words, score, KL",
    "view": "values of each token",
    "held_out": "held-out responses",
    "search": "search the log",
    "match(1)": "next match",
    "match(-1)": "previous match",
    "shift(20)": "scroll to the right",
    "shift(-20)": "scroll to the left",
}
"""Descriptions of actions whose labels in the line of keys are too short for a list. Actions of
every screen have at most 21 characters, the width of the second column; others 29."""


class HelpDialog(TextDialog):
    """Lists the keys in groups: of this screen, of the focused list, of the app."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "cancel", "close", show=False)
    ]
    HINT = "esc close · ctrl+p all commands by name"

    def __init__(self, screen: Screen[Any]) -> None:
        """Reads the bindings of `screen` now, because an open dialog replaces them."""
        super().__init__("Keys")
        self._groups = help_groups(screen)

    def lines(self) -> list[Row]:
        """The list, in two columns if the terminal is wide enough."""
        wide = self.app.size.width >= WIDE
        return side_by_side(self._groups) if wide else stacked(self._groups)


Group = list[tuple[str, str]]
"""Pairs of keys and description."""


def hidden_actions(screen: Screen[Any]) -> tuple[str, ...]:
    """The actions of a screen's keys that no list of keys shows."""
    return HIDDEN_ACTIONS if len(screen.focus_chain) > 1 else HIDDEN_ACTIONS + PANEL_ACTIONS


def help_groups(screen: Screen[Any]) -> dict[str, Group]:
    """Returns the actions of a screen in groups, each action with all its keys."""
    found: dict[str, dict[str, tuple[list[str], str]]] = {}
    left_out = hidden_actions(screen)
    for active in screen.active_bindings.values():
        binding = active.binding
        if not binding.description or binding.action in left_out:
            continue
        here = "Everywhere" if active.node is screen.app else "Here"
        if active.node is not screen and here == "Here":
            here = "In this list" if hasattr(active.node, "count") else "Here"
        keys, _ = found.setdefault(here, {}).setdefault(
            binding.action, ([], DESCRIPTIONS.get(binding.action, binding.description))
        )
        name = binding.key_display or key_name(binding.key)
        if name not in keys:
            keys.append(name)
    return {
        group: [(" ".join(keys), description) for keys, description in found[group].values()]
        for group in ("Here", "In this list", "Everywhere")
        if group in found
    }


def rows_of(name: str, group: Group) -> list[Row]:
    """Returns the lines of a group, its name first."""
    lines: list[Row] = [[(name, "strong")]]
    return lines + [[(f"  {keys:<12}", "key"), (description, "")] for keys, description in group]


def stacked(groups: dict[str, Group]) -> list[Row]:
    """Returns the groups below one another, for a narrow terminal."""
    rows: list[Row] = []
    for name, group in groups.items():
        rows += [[], *rows_of(name, group)] if rows else rows_of(name, group)
    return rows


def side_by_side(groups: dict[str, Group]) -> list[Row]:
    """Returns the keys of the app to the right of those of the screen, for a wide terminal."""
    left = stacked({n: g for n, g in groups.items() if n != "Everywhere"})
    right = stacked({n: g for n, g in groups.items() if n == "Everywhere"})
    rows: list[Row] = []
    for a, b in zip_longest(left, right, fillvalue=()):
        rows.append([*a, (" " * (COLUMN - row_width(a)), ""), *b])
    return rows
