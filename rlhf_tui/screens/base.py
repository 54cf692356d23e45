"""What all screens have in common: the lines on top, the keys below, and the open session."""

from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.screen import Screen

from rlhf_tui.state.messages import RowHighlighted
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.panels.panel import Panel
from rlhf_tui.widgets.status_lines import StatusLine, Tabs

if TYPE_CHECKING:
    from rlhf_tui.app.app import RlhfApp


class SessionScreen(Screen[None]):
    """One of the five screens."""

    MODE = ""

    @property
    def desk(self) -> "RlhfApp":
        """The app, which has the state, the view and the commands."""
        return cast("RlhfApp", self.app)

    def compose(self) -> ComposeResult:
        """Top, middle, keys."""
        yield Tabs(self.desk.state, self.MODE, read_only=self.desk.read_only)
        if self.MODE != "sessions":
            yield StatusLine(self.desk.state, id="status")
        yield from self.compose_body()
        yield KeyFooter(id="keys")

    def compose_body(self) -> ComposeResult:
        """What is the screen's own."""
        yield from ()

    def on_screen_resume(self) -> None:
        """What came while another screen was seen."""
        self.draw()

    def draw(self, *, only_live: bool = False) -> None:
        """Shows what the state says; `only_live`: only what the ranks do has changed."""
        for panel in self.query(Panel):
            panel.read(self.desk.state)
        if not only_live:
            self.refresh_content()

    def refresh_content(self) -> None:
        """What else is to be shown anew; overridden."""

    def session_changed(self) -> None:
        """Another session was opened; overridden where a screen holds anything of it."""

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """Overridden by the screens that follow their table."""
