"""Short messages to the operator: in the line of keys, or in a box."""

from textual.app import App
from textual.notifications import SeverityLevel

from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.text import sanitise
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.textual_internals import screens_of_current_mode

NOTICE_SECONDS = 5.0
"""Seconds for which a notice replaces the line of keys."""
MIN_BOX_SECONDS: dict[SeverityLevel, float] = {"information": 4, "warning": 4, "error": 8}
"""Minimum seconds for which a notice is shown in a box."""
CHARACTERS_PER_SECOND = 15.0
"""Characters that are read in a second: a long notice is shown for longer."""


class Notices:
    """Shows notices for a few seconds; nothing in them is markup."""

    def __init__(self, app: App[None]) -> None:
        self._app = app
        self._coming: set[str] = set()
        """The texts of boxes that are not yet drawn."""

    def show(self, text: str, severity: SeverityLevel) -> None:
        """Shows a notice, but no second one with the text of one in sight.

        Information replaces the line of keys for a moment, so that it covers nothing. A box ends
        it: it would cover its end.
        """
        app, text = self._app, sanitise(text)
        screens = screens_of_current_mode(app)
        screen = next(iter(screens), None)
        if isinstance(screen, SessionScreen) and screen.is_mounted:
            information = severity == "information"
            screen.query_one(KeyFooter).say(text if information else "", NOTICE_SECONDS)
            if information:
                return
        boxes = [box for top in screens[-1:] for box in top.query("Toast")]
        if text in self._coming or text in [str(box.render()) for box in boxes]:
            return  # a key that is held down says it once
        self._coming.add(text)
        timeout = max(MIN_BOX_SECONDS[severity], len(text) / CHARACTERS_PER_SECOND)
        app.notify(text, severity=severity, markup=False, timeout=timeout)
        app.call_after_refresh(lambda: self._coming.discard(text))
