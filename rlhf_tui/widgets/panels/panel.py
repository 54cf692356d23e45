"""Panels: lines that show a part of the state, under a heading."""

from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import Lines, Piece, Row, justified

BAR, REST = "━", "╌"


class Panel(Lines):
    """Lines drawn from the state; :meth:`rows` says which."""

    def __init__(
        self,
        state: SessionState,
        *,
        id: str | None = None,  # noqa: A002 - Textual's name for it
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.state = state

    def read(self, state: SessionState) -> None:
        """Another session was opened."""
        self.state = state
        self.update()


def heading(title: str, keys: str, width: int) -> Row:
    """A panel's first line: its name, and at the right what can be pressed."""
    line = justified([(f" {title}", "head")], [(f"{keys} ", "head")] if keys else [], width)
    return [(text, tone or "head") for text, tone in line] + [(" " * width, "head")]


def bar(share: float, width: int, tone: str = "accent") -> list[Piece]:
    """A progress bar."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return [(BAR * full, tone), (REST * (width - full), "dim")]
