"""The base of all screens: tabs and status on top, keys at the bottom."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import ClassVar, cast

from textual.app import ComposeResult
from textual.message import Message
from textual.screen import Screen
from textual.worker import get_current_worker

from engine.errors import RlhfError
from rlhf_tui.screens.context import AppContext
from rlhf_tui.screens.modes import MODES
from rlhf_tui.state.steering_target import SteeringTarget
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.panels.panel import Panel
from rlhf_tui.widgets.replay_line import ReplayLine
from rlhf_tui.widgets.status_lines import StatusLine, Tabs

FIRST_ROWS_TIMEOUT = 3.0
"""Seconds that keys wait for the rows of a list that is being read."""


class SessionScreen(Screen[None]):
    """The screen of a mode."""

    MODE = ""
    """The screen's key in :data:`~rlhf_tui.screens.modes.MODES`; set by the subclass."""
    WRITES: ClassVar[frozenset[str]] = frozenset()
    """Actions that `--read-only` removes."""
    READ_ONLY = "nothing can be changed"
    """Why those actions are disabled, for the notice."""

    LISTS: ClassVar[bool] = False
    """Whether the screen reads a list in a thread; it then calls :meth:`rows_read`."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled_keys: list[tuple[str, str, bool]] = []
        self._rows_read = asyncio.Event()

    @property
    def context(self) -> AppContext:
        """The app: state, viewport, preferences, commands."""
        return cast(AppContext, self.app)

    def compose(self) -> ComposeResult:
        """Tabs, the status line, the screen's own widgets, the keys."""
        context = self.context
        yield Tabs(context.state, self.MODE, tuple(MODES))
        if self.MODE != "sessions":
            status = StatusLine(context.state, id="status")
            status.read_only = not context.steers
            if not context.read_only:
                status.resume_key = "r" if self.MODE == "dashboard" else "r on screen 2"
            yield status
            if context.replaying:
                yield ReplayLine(context.state, id="replay")
        yield from self.compose_body()
        origin = "" if context.origin is None else context.origin.address
        yield KeyFooter(origin if context.steers else "read-only")

    def compose_body(self) -> ComposeResult:
        """The screen's own widgets; overridden."""
        yield from ()

    def steering_target(self) -> SteeringTarget | None:
        """The run that the steering keys act on: the open session, unless overridden."""
        session = self.context.session
        return SteeringTarget.of_state(session, self.context.state) if session else None

    def on_screen_resume(self) -> None:
        """Shows what has changed while another screen was visible."""
        self.draw()

    def read_in_thread(
        self, group: str, read: Callable[[], Message | None], *, replaces: bool = True
    ) -> bool:
        """Calls `read` in a worker thread, and posts the message that it returns to this screen.

        An RlhfError is shown.

        Args:
            group: only one reading of a group is wanted at a time.
            read: returns the message.
            replaces: whether to drop the message of a reading of this group that has not ended.
                False: does nothing then. What is read again and again must not replace itself: a
                reading that takes longer than the time between two of them would never be shown.

        Returns:
            Whether the reading has begun.
        """
        if not replaces and any(
            worker.node is self and worker.group == group and not worker.is_finished
            for worker in self.workers
        ):
            return False

        def work() -> None:
            try:
                message = read()
            except RlhfError as error:
                self.app.call_later(self.context.say, str(error), "error")
                return
            if message is not None and not get_current_worker().is_cancelled:
                self.post_message(message)

        self.run_worker(work, group=group, exclusive=True, thread=True)
        return True

    # -- keys typed ahead ----------------------------------------------------------------------

    def rows_read(self) -> None:
        """Call it when the list was read for the first time."""
        self._rows_read.set()

    async def wait_for_rows(self) -> None:
        """Waits briefly for the first rows, so that keys typed ahead act on them."""
        if self.LISTS and not self._rows_read.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._rows_read.wait(), FIRST_ROWS_TIMEOUT)
            self._rows_read.set()  # a folder that cannot be read delays one key, not all

    def draw(self, *, only_live: bool = False) -> None:
        """Shows the state; `only_live`: only phases and machine have changed."""
        for panel in self.query(Panel):
            panel.read(self.context.state)
        if not only_live:
            self.refresh_content()
            self.refresh_keys()

    # -- keys ----------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hides what `--read-only` removes; disables what cannot act on what is selected."""
        if self.context.read_only and action in self.WRITES:
            return False
        return None if self.why_disabled(action) else True

    def why_disabled(self, action: str) -> str:
        """Why an action of this screen is disabled; empty if it is enabled. May be extended."""
        if not self.context.read_only or action not in self.WRITES:
            return ""
        return f"{'a copy over ssh' if self.context.steers else 'read-only'}: {self.READ_ONLY}"

    def refresh_keys(self) -> None:
        """Redraws the line of keys if the enabled keys have changed."""
        enabled = [(key, b.binding.action, b.enabled) for key, b in self.active_bindings.items()]
        if enabled != self._enabled_keys:
            self._enabled_keys = enabled
            self.refresh_bindings()

    # -- overridden by the screens -------------------------------------------------------------

    def refresh_content(self) -> None:
        """Shows the parts of the state that no panel shows; overridden."""

    def session_changed(self) -> None:
        """Another session was opened: drops the data of the previous one; overridden."""
