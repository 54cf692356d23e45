"""The footer of a screen: the keys that are available, as many as fit."""

from rich.cells import cell_len
from textual import events
from textual.binding import Binding
from textual.timer import Timer

from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Lines, Piece, Row, row_width, shorten, shorten_middle

NAMES = {
    "left_square_bracket": "[", "right_square_bracket": "]", "question_mark": "?", "slash": "/",
    "exclamation_mark": "!", "plus": "+", "minus": "-", "equals_sign": "=", "comma": ",",
    "full_stop": ".", "left_curly_bracket": "{", "right_curly_bracket": "}",
    "up": "↑", "down": "↓", "left": "←", "right": "→", "escape": "esc", "number_sign": "#",
    "less_than_sign": "<", "greater_than_sign": ">", "pageup": "pgup", "pagedown": "pgdn",
}  # fmt: skip


def key_name(key: str) -> str:
    """The label of a key: `[` for `left_square_bracket`."""
    return NAMES.get(key, key.replace("shift+", "⇧").replace("⇧left", "⇧←").replace("⇧right", "⇧→"))


class KeyFooter(Lines):
    """Shows the active bindings that have `show`, those of the screen before those of the app."""

    def __init__(self, note: str) -> None:
        """`note` stands beside the help, such as `read-only`."""
        super().__init__(id="keys")
        self._note = note
        self._notice = ""
        self._shown_until: Timer | None = None
        self._places: list[tuple[int, str]] = []
        """The column after each key of the line, and the key; empty for a gap."""

    def say(self, text: str, seconds: float) -> None:
        """Shows a notice instead of the keys, for some seconds or until the next notice."""
        if self._shown_until is not None:
            self._shown_until.stop()
        self._notice = text
        self._shown_until = self.set_timer(seconds, lambda: self.say("", 1)) if text else None
        self.update()

    def rows(self, width: int, height: int) -> list[Row]:
        """One line, which always ends in the note and `? help`."""
        self._places = []
        if self._notice:
            text = one_line(f" {self._notice}")
            return [[(shorten(text, width), "notice")]]
        help_key: list[Piece] = [("?", "key"), (" help ", "dim")]
        note = shorten_middle(self._note, min(cell_len(self._note), width // 3))
        right: list[Piece] = [(note, "warn"), ("  ", "")] if note else []
        room = width - row_width(right) - row_width(help_key)
        row: list[Piece] = [(" ", "")]
        for key, description, pressed in self._shown():
            piece: list[Piece] = [(key, "key"), (f" {description}  ", "dim")]
            if row_width(row) + row_width(piece) > room:
                break
            row += piece
            self._places.append((row_width(row), pressed))
        self._places += [(width - row_width(help_key), ""), (width, "question_mark")]
        return [[*row, (" " * (room - row_width(row)), ""), *right, *help_key]]

    def on_click(self, event: events.Click) -> None:
        """Presses the key that was clicked."""
        key = next((key for end, key in self._places if event.x < end), "")
        if key:
            self.app.simulate_key(key)

    def _shown(self) -> list[tuple[str, str, str]]:
        """(label, description, key) of the bindings to show."""
        of_screen: list[tuple[str, str, str]] = []
        of_app: list[tuple[str, str, str]] = []
        seen: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding: Binding = active.binding
            if not binding.show or not active.enabled or binding.action in seen:
                continue
            seen.add(binding.action)
            keys = binding.key_display or key_name(binding.key)
            target = of_app if active.node is self.app else of_screen
            target.append((keys, binding.description, binding.key))
        return of_screen + of_app

    def on_mount(self) -> None:
        """Updates when the bindings change."""
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.update())
