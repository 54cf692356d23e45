"""The terminal app: five screens on one session, which it watches and steers but never trains.

It may end, or lose its terminal, at any moment: the engine lives elsewhere and the journal keeps
everything.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import Screen

from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.session.folder import all_sessions, find
from rlhf_tui.app import hangup
from rlhf_tui.app import preferences as prefs
from rlhf_tui.app.following import TICK
from rlhf_tui.app.launching import Launch
from rlhf_tui.app.no_color import NoColorFilter
from rlhf_tui.app.steering import ACTIONS, Steer
from rlhf_tui.app.themes import THEMES
from rlhf_tui.state.first_read import SPANS, FirstRead
from rlhf_tui.state.series import Series
from rlhf_tui.text import one_line
from rlhf_tui.widgets.key_footer import key_name

SCREENS = {
    "sessions": "SessionsScreen",
    "dashboard": "DashboardScreen",
    "samples": "SamplesScreen",
    "checkpoints": "CheckpointsScreen",
    "log": "LogScreen",
}
"""Mode (and module) → the screen's class, in the order of the keys 1 to 5."""


def _screen(mode: str) -> Screen[Any]:
    """A screen, imported when it is first seen: the first picture does not wait for the others."""
    module = importlib.import_module(f"rlhf_tui.screens.{mode}")
    screen: Screen[Any] = getattr(module, SCREENS[mode])()
    return screen


class RlhfApp(Steer, Launch, inherit_bindings=False):
    """What the operator sits at."""

    TITLE = "rlhf-tui"
    CSS_PATH = "app.tcss"
    MODES = {mode: functools.partial(_screen, mode) for mode in SCREENS}
    HORIZONTAL_BREAKPOINTS = [
        (0, "-narrow"), (110, "-normal"), (170, "-wide"),
    ]  # fmt: skip
    VERTICAL_BREAKPOINTS = [
        (0, "-tiny"), (14, "-low"), (23, "-high"),
    ]  # fmt: skip
    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(i), f"go('{mode}')", mode, show=False)
            for i, mode in enumerate(SCREENS, start=1)
        ),
        *Steer.STEERING,
        Binding("t", "theme", "theme", show=False),
        Binding("question_mark", "help", "help", show=False),
        Binding("q", "detach", "detach"),
        Binding("ctrl+c", "detach", "detach", show=False, priority=True),
    ]

    def __init__(
        self,
        root: Path,
        name: str | None = None,
        *,
        read_only: bool = False,
        now: Callable[[], float] = time.time,
        follow: bool = True,
        glance: FirstRead | None = None,
    ) -> None:
        """On a folder of sessions, and one of them.

        Args:
            root: the folder.
            name: the session to open; None for the browser.
            read_only: no commands.
            now: the clock, for tests.
            follow: False reads each session once and no more, for tests.
            glance: a first look at that session, which is under way.
        """
        self.farewell = ""
        """The last line, printed after the screen is given back."""
        preferences, self._complaint = prefs.load_preferences()
        try:
            session = find(root.resolve(), name) if name is not None else None
        except RlhfError as error:
            session, self._complaint = None, str(error)
        # The first screen is the one to be seen: an empty one would be laid out before it.
        self.DEFAULT_MODE = "sessions" if session is None else "dashboard"  # type: ignore[misc]
        super().__init__(root, read_only=read_only, now=now, follow=follow, preferences=preferences)
        self._glance = glance
        if session is not None:
            self.take_session(session)
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = preferences.theme

    def get_line_filters(self) -> Sequence[LineFilter]:
        """With NO_COLOR no colour codes at all; Textual alone would send greys."""
        return [NoColorFilter()] if self.no_color else super().get_line_filters()

    def on_load(self) -> None:
        """Before the first picture: what was seen so far shall be in it."""
        if self._glance is not None and self._glance.session == self.session:
            self.state.take(self._glance.news())

    def on_mount(self) -> None:
        """The first screen is there: the rest may take its time."""
        self.call_after_refresh(self.begin)
        self.set_interval(TICK, self.tick)
        if self._complaint:
            self.say(self._complaint, "warning")
        if not self.is_headless:
            hangup.on_hang_up(self.hang_up)
            hangup.watch_terminal()

    # -- leaving -------------------------------------------------------------------------------

    def action_detach(self) -> None:
        """Leaves; the engine goes on."""
        self.detach()

    def detach(self, code: int = 0) -> None:
        """Gives the terminal back, and says what goes on behind it."""
        self.leave()
        engine = self.session.engine() if self.session and self.session.is_live() else None
        if engine is not None and self.session is not None:
            name = self.session.name
            self.farewell = (
                f"detached; engine pid {engine.pid} still running; "
                f"reattach with rlhf-tui attach {name}"
            )
        self.exit(return_code=code)

    def hang_up(self, code: int) -> None:
        """The connection has dropped, or the process shall end."""
        self.detach(code)
        hangup.end_soon(code)

    # -- keys ----------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """With --read-only there are no commands."""
        return not (self.read_only and action in ACTIONS)

    async def action_go(self, mode: str) -> None:
        """To another screen."""
        if mode != "sessions" and self.session is None:
            self.say("open a session first: enter opens the chosen one")
            return
        await self.switch_mode(mode)

    def action_theme(self) -> None:
        """The next theme."""
        names = [t.name for t in THEMES]
        self.theme = names[(names.index(self.theme) + 1) % len(names)]
        self.remember()
        self.say(f"theme: {self.theme}")

    def action_help(self) -> None:
        """Every key that works here."""
        from rlhf_tui.dialogs.help import HelpDialog  # noqa: PLC0415 - keeps the start quick

        self.push_screen(HelpDialog(self.screen))

    def pick_other(self) -> None:
        """Another session's curves beside these; chosen again, away."""
        from rlhf_tui.dialogs.picker import Option, PickerDialog  # noqa: PLC0415 - keeps the start quick

        names = [s.name for s in all_sessions(self.root) if s.name != self.state.name]
        if not names:
            self.say(f"there is no other session in {self.root}")
            return
        options = [Option(n, n, "shown" if n in self.view.others else "") for n in names]

        def take(name: str | None) -> None:
            if name is None:
                return
            if self.view.others.pop(name, None) is None:
                try:
                    with JournalReader(find(self.root, name)) as record:
                        found = record.outlines(self.preferences.metrics(), SPANS)
                        self.view.others[name] = {n: Series(found[n]) for n in found}
                except RlhfError as error:
                    self.say(str(error), "error")
            self.draw_all()

        self.push_screen(PickerDialog("Beside these curves", options), take)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: everything that has a key, by name, with its key."""
        seen = set()
        for active in screen.active_bindings.values():
            binding = active.binding
            words = binding.description
            if words and active.enabled and binding.action not in seen and not binding.system:
                seen.add(binding.action)
                yield SystemCommand(
                    words[0].upper() + words[1:],
                    f"key {binding.key_display or key_name(binding.key)}",
                    _action(self, binding.action, active.node),
                )
        for theme in THEMES:
            yield SystemCommand(f"Theme: {theme.name}", "colours", _setter(self, theme.name))


def _action(desk: RlhfApp, action: str, node: Any) -> Callable[[], Any]:
    async def run() -> None:
        await desk.run_action(action, node)

    return run


def _setter(desk: RlhfApp, theme: str) -> Callable[[], None]:
    def choose() -> None:
        desk.theme = theme
        desk.remember()

    return choose


def open_app(root: Path, name: str | None, read_only: bool, glance: FirstRead | None = None) -> int:
    """Opens the terminal app on a folder of sessions, or on one of them.

    Returns:
        The exit code.
    """
    desk = RlhfApp(root, name, read_only=read_only, glance=glance)
    desk.run()
    if desk.farewell:
        print(one_line(desk.farewell))  # noqa: T201
    return desk.return_code or 0
