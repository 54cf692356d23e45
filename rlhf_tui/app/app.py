"""The Textual app: keys, modes, themes and the command palette.

The parts it owns do the work: :class:`SessionFollower` follows the open session, :class:`Steering`
carries out the keys that steer it, :class:`CommandTracker` sends their commands,
:class:`EngineStarter` starts engines. The app never trains: if it ends or loses its terminal, the
engine keeps running.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.dom import DOMNode
from textual.filter import LineFilter
from textual.notifications import SeverityLevel

from engine.errors import RlhfError
from engine.session.folder import SessionFolder, find
from rlhf_tui import format as fmt
from rlhf_tui.app import hangup, replaying, steering
from rlhf_tui.app.command_tracker import CommandTracker
from rlhf_tui.app.following import TICK_INTERVAL, SessionFollower
from rlhf_tui.app.launching import EngineStarter
from rlhf_tui.app.no_color import NoColorFilter
from rlhf_tui.app.notices import Notices
from rlhf_tui.app.sequential_keys import SequentialKeys
from rlhf_tui.app.themes import themes_of
from rlhf_tui.dialogs.digest import OWN_KEYS, DigestDialog
from rlhf_tui.identity import who
from rlhf_tui.screens import modes
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext, Origin
from rlhf_tui.state import preferences as prefs
from rlhf_tui.state.feeds.first_read import FirstRead
from rlhf_tui.state.messages import CommandAnswered, EngineStarted, SessionUpdated
from rlhf_tui.state.replay.player import ReplayOptions
from rlhf_tui.state.runs.listing import SessionListCache
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.steering_target import NO_SESSION, SteeringTarget
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.text import one_line
from rlhf_tui.widgets.textual_internals import (
    bindings_of_key,
    screens_of_all_modes,
    screens_of_current_mode,
)

DETACH_KEYS = ("q", "ctrl+c")
"""The keys of :meth:`RlhfApp.action_detach`."""


def _palette_commands() -> type[Provider]:
    from rlhf_tui.app.palette import PaletteCommands  # noqa: PLC0415 - keeps start-up short

    return PaletteCommands


class RlhfApp(SequentialKeys, inherit_bindings=False):
    """The dashboard; an :class:`AppContext` for its screens."""

    TITLE = "rlhf-tui"
    CSS_PATH = "app.tcss"
    MODES = {mode: functools.partial(modes.create_screen, mode) for mode in modes.MODES}
    HORIZONTAL_BREAKPOINTS = [
        (0, "-narrow"), (110, "-normal"), (170, "-wide"),
    ]  # fmt: skip
    VERTICAL_BREAKPOINTS = [
        (0, "-tiny"), (14, "-low"), (23, "-high"),
    ]  # fmt: skip
    ENABLE_COMMAND_PALETTE = True
    COMMANDS = {_palette_commands}
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(i), f"go('{mode}')", mode, show=False)
            for i, mode in enumerate(modes.MODES, start=1)
        ),
        *steering.BINDINGS,
        *replaying.BINDINGS,
        Binding("t", "theme", "theme", show=False),
        Binding("question_mark", "help", "help", show=False),
        Binding("q", "detach", "detach"),
        Binding("ctrl+c", "detach", "detach", show=False, priority=True),
        # A terminal sends escape, then q at once, as alt+q.
        Binding("alt+q", "detach", show=False, priority=True),
    ]

    def __init__(
        self,
        root: Path,
        name: str | None = None,
        *,
        read_only: bool = False,
        now: Callable[[], float] = time.time,
        follow: bool = True,
        first_read: FirstRead | None = None,
        replay: ReplayOptions | None = None,
        origin: Origin | None = None,
        listing: SessionListCache | None = None,
    ) -> None:
        """Opens a folder of sessions, or one session in it.

        Args:
            root: the folder.
            name: the session to open; None for the browser.
            read_only: disables commands.
            now: the wall clock.
            follow: False reads each session once and never again, for tests.
            first_read: a summary of that session whose reading has begun.
            replay: replays sessions and disables commands; None: shows them as they are.
            origin: the session that this one is a copy of: commands reach it, but nothing else
                may be changed. None if it is not a copy.
            listing: the folder's list of sessions, which may already be loading.
        """
        self.root = root.resolve()
        self.steers = not read_only and replay is None
        self.read_only = not self.steers or origin is not None
        self.origin = origin
        self.listing = listing or SessionListCache()
        self.replaying = replay is not None
        self.now = now
        self.who = who()
        self.exit_message = ""
        """Printed after the terminal is restored."""
        self.preferences, self._problem = prefs.load_preferences()
        try:
            session = find(self.root, name) if name is not None else None
        except RlhfError as error:
            session, self._problem = None, str(error)
        # Otherwise Textual lays out an empty default screen first.
        self.DEFAULT_MODE = "sessions" if session is None else "dashboard"  # type: ignore[misc] # a class variable there
        super().__init__()
        self.animation_level = "none"
        self._notices = Notices(self)
        context = as_context(self)
        self.follower = SessionFollower(
            self, context, follow=follow, replay=replay, draw=self.draw_screens
        )
        self.commands = CommandTracker(self, context, self.steering_target)
        self.steering = steering.Steering(self, context, self.commands)
        self.engines = EngineStarter(self, context)
        self._first_read = first_read
        if session is not None:
            self.follower.open(session)
        # The console is what Textual writes with: what it finds out of the terminal holds.
        for theme in themes_of(self.console.color_system):
            self.register_theme(theme)
        self.theme = self.preferences.theme

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Removes all colour codes if NO_COLOR is set; Textual by itself would send greys."""
        return [NoColorFilter()] if self.no_color else super().get_line_filters()

    def on_load(self) -> None:
        """Adds what was read before the first frame."""
        if self._first_read is not None and self._first_read.session == self.session:
            self.state.take(self._first_read.update())

    def on_mount(self) -> None:
        """Starts to read after the first frame."""
        self.call_after_refresh(self.follower.begin)
        self.set_interval(TICK_INTERVAL, self.follower.tick)
        if self._problem:
            self.say(self._problem, "warning")
        if not self.is_headless:
            hangup.on_hang_up(self.hang_up)
            hangup.watch_terminal()

    # -- the open session ----------------------------------------------------------------------

    @property
    def session(self) -> SessionFolder | None:
        """The open session; None in the browser before any was opened."""
        return self.follower.session

    @property
    def state(self) -> SessionState:
        """What was read of the open session."""
        return self.follower.state

    @property
    def view(self) -> Viewport:
        """The window and crosshair that the charts share."""
        return self.follower.view

    def open_session(self, name: str) -> bool:
        """Follows a session and shows its dashboard; False, with a notice, if there is none."""
        if not self.follower.follows(name):
            try:
                session = find(self.root, name)
            except RlhfError as error:
                self.say(str(error), "error")
                return False
            self.follower.open(session)
            self._drop_lists()
            self.follower.begin()
        self.switch_mode("dashboard")
        return True

    def _drop_lists(self) -> None:
        """Tells the screens that their data belongs to another session or moment."""
        for screen in screens_of_all_modes(self):
            if isinstance(screen, SessionScreen) and screen.is_mounted:
                screen.session_changed()

    def forget_session(self, name: str) -> None:
        """Stops following a session that is about to be deleted."""
        self.follower.forget(name)

    def read_metrics(self) -> None:
        """Reads the metrics of the charts in the preferences, which have changed."""
        self.follower.read_metrics()

    def draw_screens(self, *, only_live: bool) -> None:
        """Draws the screens of this mode; `only_live`: only phases and machine have changed."""
        if not self.is_running:
            return  # a timer may still fire while Textual removes the widgets
        for screen in screens_of_current_mode(self):
            if isinstance(screen, SessionScreen) and screen.is_mounted:
                screen.draw(only_live=only_live)

    # -- messages ------------------------------------------------------------------------------

    def on_session_updated(self, message: SessionUpdated) -> None:
        """Adds an update of the feed; drops it if it is of another session."""
        before, now = self.state.replay, message.update.replay
        taken = self.follower.take(message)
        if taken and before is not None and now is not None and now.share < before.share:
            self._drop_lists()  # what they show is still to come
        if taken and message.update.head and self.session is not None:
            self.commands.run_read(SteeringTarget.of_state(self.session, self.state))

    def on_command_answered(self, message: CommandAnswered) -> None:
        """Shows the reply to a command."""
        self.commands.answered(message)
        if message.reply is not None and message.reply.final:
            self.follower.command_ended()

    def on_engine_started(self, message: EngineStarted) -> None:
        """Shows whether an engine has started."""
        self.engines.started(message)

    # -- notices -------------------------------------------------------------------------------

    def say(self, text: str, severity: SeverityLevel = "information") -> None:
        """Shows a notice for a few seconds, see :class:`Notices`."""
        self._notices.show(text, severity)

    # -- leaving -------------------------------------------------------------------------------

    def action_detach(self) -> None:
        """Leaves the app; the engine keeps running."""
        self.detach()

    def detach(self, code: int = 0) -> None:
        """Restores the terminal; the exit message names the engine that keeps running."""
        self.follower.leave()
        engine = self.session.engine() if self.session and self.session.may_be_live() else None
        if engine is not None and self.session is not None:
            if self.origin is None:
                attach = self.state.command("attach", self.session.name)
            else:
                attach = fmt.command("attach", self.origin.address)
            self.exit_message = (
                f"detached; engine pid {engine.pid} still running; reattach with {attach}"
            )
        self.exit(return_code=code)

    def hang_up(self, code: int) -> None:
        """Leaves the app after a dropped connection or a signal."""
        self.detach(code)
        hangup.end_soon(code)

    # -- keys ----------------------------------------------------------------------------------

    async def wait_until_ready(self, key: str) -> None:
        """Waits for the rows that a key typed ahead is meant for, except for the keys that leave.

        A digest that opened meanwhile does not take the key.
        """
        if isinstance(self.screen, DigestDialog) and key not in OWN_KEYS:
            await self.screen.dismiss()
        if isinstance(self.screen, SessionScreen) and key not in DETACH_KEYS:
            await self.screen.wait_for_rows()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Steering keys are enabled only if the selected run takes commands."""
        if action == "replay":
            # Not over a dialog: a space is text in its fields.
            return self.follower.replay is not None and isinstance(self.screen, SessionScreen)
        return self.steering.offered(str(parameters[0])) if action == "steer" else True

    def on_key(self, event: events.Key) -> None:
        """Shows why a key does nothing if its action is disabled."""
        screen = self.screen
        if not isinstance(screen, SessionScreen):
            return
        reasons = [
            *(screen.why_disabled(action) for action in actions_of_key(screen, event.key)),
            *(
                self.steering.why_disabled()
                for action in actions_of_key(self, event.key)
                if action == "steer"
            ),
        ]
        if reason := next(filter(None, reasons), ""):
            self.say(reason, "warning")

    def steering_target(self) -> SteeringTarget | None:
        """The run that the steering keys act on, which depends on the screen."""
        screens = screens_of_current_mode(self)
        screen = next((s for s in screens if isinstance(s, SessionScreen)), None)
        return screen.steering_target() if screen is not None and screen.is_mounted else None

    def action_steer(self, action: str) -> None:
        """Carries out a steering key, see :data:`steering.BINDINGS`."""
        self.steering.act(action)

    def action_replay(self, action: str) -> None:
        """Carries out a key of a replay, see :data:`replaying.BINDINGS`."""
        if self.follower.replay is not None:
            self.follower.replay.act(action)

    async def action_go(self, mode: str) -> None:
        """Shows another screen."""
        if mode != "sessions" and self.session is None:
            target = self.steering_target()
            opens = f"open a session first: enter opens {target.name}" if target else NO_SESSION
            self.say(opens, "warning")
            return
        await self.switch_mode(mode)

    def action_help(self) -> None:
        """Lists every key of this screen."""
        from rlhf_tui.dialogs.help import HelpDialog  # noqa: PLC0415 - keeps start-up short

        self.push_screen(HelpDialog(self.screen))

    # -- themes and palette --------------------------------------------------------------------

    def action_theme(self) -> None:
        """Switches to the next theme."""
        names = prefs.THEME_NAMES
        self.choose_theme(names[(names.index(self.theme) + 1) % len(names)])
        self.say(f"theme: {self.theme}")

    def choose_theme(self, name: str) -> None:
        """Sets the theme and saves it for the next start."""
        self.theme = name
        self.save_preferences()

    def save_preferences(self) -> None:
        """Writes the preferences in a thread: a home on a network may be slow."""
        self.preferences.theme = self.theme
        threading.Thread(
            target=prefs.save, args=(prefs.preferences_file(), self.preferences), daemon=True
        ).start()

    def action_command_palette(self) -> None:
        """Shows the palette of all commands."""
        from rlhf_tui.dialogs.palette import PaletteDialog  # noqa: PLC0415 - keeps start-up short

        if not isinstance(self.screen, PaletteDialog):
            self.push_screen(PaletteDialog(id="--command-palette"))


def actions_of_key(node: DOMNode, key: str) -> list[str]:
    """The names of the actions that a node binds to a key, without their parameters."""
    return [binding.action.partition("(")[0] for binding in bindings_of_key(node, key)]


def as_context(app: RlhfApp) -> AppContext:
    """Returns the app; the type checker compares it with the protocol of the screens here."""
    return app


def run_app(app: RlhfApp) -> int:
    """Runs the app, then prints its exit message. Returns the exit code."""
    app.run()
    if app.exit_message:
        print(one_line(app.exit_message))  # noqa: T201
    return app.return_code or 0
