"""Removes colours from the output when NO_COLOR is set."""

from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter


class NoColorFilter(LineFilter):
    """Removes every colour; keeps bold, dim, underline and reverse."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Style, Style] = {}

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Returns the segments of a line without colours."""
        return [Segment(text, self._plain(style), control) for text, style, control in segments]

    def _plain(self, style: Style | None) -> Style | None:
        if style is None:
            return None
        if style not in self._known:
            self._known[style] = style.without_color + Style(meta=style.meta or None)
        return self._known[style]
