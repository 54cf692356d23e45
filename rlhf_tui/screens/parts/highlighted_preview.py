"""The preview on the sessions screen: where it is placed, and when it is read."""

from pathlib import Path

from textual.timer import Timer

from engine.session.folder import SessionFolder
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.screens.parts.panel_placement import place_panel
from rlhf_tui.state.messages import SessionPreviewed
from rlhf_tui.state.runs.session_preview import read_preview
from rlhf_tui.state.runs.session_row import ListedSession, SessionRow
from rlhf_tui.widgets.panels.preview import PreviewPanel
from rlhf_tui.widgets.table import Table

PREVIEW_DELAY = 0.15
"""Seconds that a row is highlighted before its preview is read."""
MIN_HEIGHT_BESIDE = 20
"""Lines of the screen from which on the preview may be beside the table."""


class HighlightedPreview:
    """Shows the preview of the highlighted session beside the table, below it, or nowhere."""

    def __init__(self, screen: SessionScreen, context: AppContext, table: Table) -> None:
        """Reads nothing yet.

        Args:
            screen: has the container `#browser` and the panel; receives the messages.
            context: the app.
            table: the list of sessions.
        """
        self._screen = screen
        self._context = context
        self._table = table
        self._asked: tuple[ListedSession, SessionFolder | None] | None = None
        """The row whose preview was asked for last, and the session it is compared with."""
        self._due: Timer | None = None

    def fit(self) -> None:
        """Puts the preview where there is room; call it when the size or the rows change."""
        browser, size = self._screen.query_one("#browser"), self._screen.size
        place_panel(browser, self._table, size, min_height_beside=MIN_HEIGHT_BESIDE)

    def ask(self, listed: ListedSession | None) -> None:
        """Schedules reading the preview if another row is highlighted or its values have changed.

        The delay avoids reading every session on the way when moving through the list.
        """
        shown = self._screen.query_one("#browser").classes & {"beside", "below"}
        if listed is None or not shown:
            return
        session, folder = self._context.session, Path(listed.row.folder)
        other = None if session == SessionFolder(folder) else session
        if self._asked == (listed, other):
            return
        before, self._asked = self._asked, (listed, other)
        # The row of a live run changes with each reading of the list.
        another = before is None or (before[0].row.folder, before[1]) != (listed.row.folder, other)
        if self._due is not None:
            self._due.stop()

        def read() -> SessionPreviewed:
            return SessionPreviewed(read_preview(SessionFolder(folder), other))

        def begin() -> None:
            if not self._screen.read_in_thread("preview", read, replaces=another):
                self._asked = before  # asked again when the list is read again

        self._due = self._screen.set_timer(PREVIEW_DELAY, begin)

    def take(self, message: SessionPreviewed, highlighted: SessionRow | None) -> None:
        """Shows a preview that was read, if its session is still highlighted."""
        if highlighted is not None and highlighted.folder == message.preview.folder:
            panel = self._screen.query_one(PreviewPanel)
            panel.show(highlighted.name, message.preview)
