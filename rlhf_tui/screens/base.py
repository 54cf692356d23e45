"""What all screens have in common: the lines on top, the keys below, and the open session."""

from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.screen import Screen

from rlhf_tui.messages import Pointed
from rlhf_tui.widgets.keys import Keys
from rlhf_tui.widgets.panel import Panel
from rlhf_tui.widgets.topline import Status, Tabs

if TYPE_CHECKING:
    from rlhf_tui.app import Desk


class Place(Screen[None]):
    """One of the five screens."""

    MODE = ""

    @property
    def desk(self) -> "Desk":
        """The app, which has the book, the view and the commands."""
        return cast("Desk", self.app)

    def compose(self) -> ComposeResult:
        """Top, middle, keys."""
        yield Tabs(self.desk.book, self.MODE, read_only=self.desk.read_only)
        if self.MODE != "sessions":
            yield Status(self.desk.book, id="status")
        yield from self.middle()
        yield Keys(id="keys")

    def middle(self) -> ComposeResult:
        """What is the screen's own."""
        yield from ()

    def on_screen_resume(self) -> None:
        """What came while another screen was seen."""
        self.draw()

    def draw(self, *, only_now: bool = False) -> None:
        """Shows what the book says; `only_now`: only what the ranks do has changed."""
        for panel in self.query(Panel):
            panel.read(self.desk.book)
        if not only_now:
            self.drawn()

    def drawn(self) -> None:
        """What else is to be shown anew; overridden."""

    def opened(self) -> None:
        """Another session was opened; overridden where a screen holds anything of it."""

    def on_pointed(self, message: Pointed) -> None:
        """Overridden by the screens that follow their table."""
