"""The last line of a screen: the keys that work here, as many as fit."""

from textual.binding import Binding
from textual.timer import Timer

from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Lines, Piece, Row, row_width, shorten

NAMES = {
    "left_square_bracket": "[", "right_square_bracket": "]", "question_mark": "?", "slash": "/",
    "exclamation_mark": "!", "plus": "+", "minus": "-", "equals_sign": "=", "comma": ",",
    "full_stop": ".",
    "up": "↑", "down": "↓", "left": "←", "right": "→", "escape": "esc", "number_sign": "#",
    "less_than_sign": "<", "greater_than_sign": ">", "pageup": "pgup", "pagedown": "pgdn",
}  # fmt: skip


def key_name(key: str) -> str:
    """The label of a key on the keyboard."""
    return NAMES.get(key, key.replace("shift+", "⇧").replace("⇧left", "⇧←").replace("⇧right", "⇧→"))


class KeyFooter(Lines):
    """Made from the bindings: those with `show`, the screen's own first."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(id=id)
        self._notice = ""
        self._shown_until: Timer | None = None

    def say(self, text: str, seconds: float) -> None:
        """A notice in place of the keys, for some seconds or until the next one."""
        if self._shown_until is not None:
            self._shown_until.stop()
        self._notice = text
        self._shown_until = self.set_timer(seconds, lambda: self.say("", 1)) if text else None
        self.update()

    def rows(self, width: int, height: int) -> list[Row]:
        """One line, `? help` always at its end."""
        if self._notice:
            text = one_line(f" {self._notice}")
            return [[(shorten(text, width), "notice")]]
        last: list[Piece] = [("?", "key"), (" help ", "dim")]
        room = width - row_width(last)
        row: list[Piece] = [(" ", "")]
        for key, words in self._shown():
            piece: list[Piece] = [(key, "key"), (f" {words}  ", "dim")]
            if row_width(row) + row_width(piece) > room:
                break
            row += piece
        return [[*row, (" " * (room - row_width(row)), ""), *last]]

    def _shown(self) -> list[tuple[str, str]]:
        own: list[tuple[str, str]] = []
        general: list[tuple[str, str]] = []
        seen: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding: Binding = active.binding
            if not binding.show or not active.enabled or binding.action in seen:
                continue
            seen.add(binding.action)
            keys = binding.key_display or key_name(binding.key)
            target = general if active.node is self.app else own
            target.append((keys, binding.description))
        return own + general

    def on_mount(self) -> None:
        """Draws again when the bindings change."""
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.update())
