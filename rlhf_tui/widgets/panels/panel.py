"""The base of the dashboard's panels, their headings and progress bars."""

from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import Lines, Piece, Row, justified

BAR, REST = "━", "╌"


class Panel(Lines):
    """Lines computed from the session's state by :meth:`rows`."""

    def __init__(
        self,
        state: SessionState,
        *,
        id: str | None = None,  # noqa: A002 - Textual's name for it
    ) -> None:
        super().__init__(id=id)
        self.state = state

    def read(self, state: SessionState) -> None:
        """Shows another state. Call it when another session is opened."""
        self.state = state
        self.update()


def heading(title: str, keys: str, width: int, *, focused: bool = False) -> Row:
    """A panel's first line: its title, and its keys on the right."""
    # The mark repeats what the colour shows, for terminals without colour.
    mark, head = ("▸", "focus") if focused else (" ", "head")
    line = justified([(f"{mark}{title}", head)], [(f"{keys} ", head)] if keys else [], width)
    return [(text, tone or head) for text, tone in line] + [(" " * width, head)]


def bar(share: float, width: int, tone: str = "accent") -> list[Piece]:
    """A progress bar of `width` cells; `share` is clamped to [0, 1]."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return [(BAR * full, tone), (REST * (width - full), "dim")]
