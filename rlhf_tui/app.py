"""The terminal app: five screens on one session, which it watches and steers but never trains.

It may end, or lose its terminal, at any moment: the engine lives elsewhere and the journal keeps
everything.
"""

import functools
import gc
import importlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import Screen

from engine.errors import RlhfError
from engine.record import Record
from engine.session import Session, find, find_all
from rlhf_tui import preferences as prefs
from rlhf_tui.feed import Feed
from rlhf_tui.messages import Heard
from rlhf_tui.screens.base import Place
from rlhf_tui.screens.dialogs import Ask, Choice
from rlhf_tui.screens.launch import Launch
from rlhf_tui.screens.picker import Option, Pick
from rlhf_tui.screens.plain import Plain
from rlhf_tui.screens.steer import ACTIONS, Steer
from rlhf_tui.screens.themes import THEMES
from rlhf_tui.text import one_line, sanitise
from rlhf_tui.widgets.book import ALWAYS, Book
from rlhf_tui.widgets.keys import Keys, key_name
from rlhf_tui.widgets.series import Series
from rlhf_tui.widgets.view import View

DRAW_AFTER = 0.04
"""Seconds in which news that comes together is drawn together."""
TICK = 1.0
NOTICE = 5.0
NOTED_EVERY = 30.0
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


class Desk(Steer, Launch, App[None], inherit_bindings=False):
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
    ) -> None:
        """On a folder of sessions, and one of them.

        Args:
            root: the folder.
            name: the session to open; None for the browser.
            read_only: no commands.
            now: the clock, for tests.
            follow: False reads each session once and no more, for tests.
        """
        super().__init__()
        self.animation_level = "none"
        self.root = root.resolve()
        self.read_only = read_only
        self.now = now
        self.follow = follow
        self.who = _who()
        self.preferences, self._complaint = prefs.load_preferences()
        self.session: Session | None = None
        self.book = Book(now=now)
        self.view = self._new_view()
        self._feed: Feed | None = None
        self._first = name
        self._draw_due = False
        self._only_now = True
        """Since the last drawing nothing has changed but what the ranks do now."""
        self._digested = True
        self._noted = now()
        self.farewell = ""
        """The last line, printed after the screen is given back."""
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = self.preferences.theme

    def get_line_filters(self) -> Sequence[LineFilter]:
        """With NO_COLOR no colour codes at all; Textual alone would send greys."""
        return [Plain()] if self.no_color else super().get_line_filters()

    async def on_mount(self) -> None:
        """The first screen."""
        if self._first is None or not self.open_session(self._first):
            await self.switch_mode("sessions")
        self.set_interval(TICK, self._tick)
        if self._complaint:
            self.say(self._complaint, "warning")

    # -- the open session ----------------------------------------------------------------------

    def open_session(self, name: str) -> bool:
        """Follows another session and shows its dashboard; False where it cannot be opened."""
        if self.session is None or self.session.name != name or self._feed is None:
            try:
                session = find(self.root, name)
                batch = session.config().rollout.batch_size
            except (RlhfError, OSError) as error:
                self.say(str(error), "error")
                return False
            self._leave()
            self.session = session
            self.book = Book(name, batch, self.now)
            self.view = self._new_view()
            self._digested = False
            folder = str(session.folder)
            names = [*self._charted(), *ALWAYS]
            self._feed = Feed(
                session, self.who, names, lambda news: self.post_message(Heard(folder, news))
            )
            for screen in self._places():
                if screen.is_mounted:
                    screen.opened()
            if self.follow:
                self._feed.start()
            else:
                self._feed.read_all()
        self.switch_mode("dashboard")
        return True

    def _new_view(self) -> View:
        return View(weight=self.preferences.weight, past=self.preferences.past)

    def _charted(self) -> list[str]:
        return [n.strip() for spec in self.preferences.charts for n in spec.split(" + ")]

    def want(self, specs: Iterable[str]) -> None:
        """Reads the metrics of new charts."""
        if self._feed is not None:
            self._feed.want(n.strip() for spec in specs for n in spec.split(" + "))

    def _leave(self) -> None:
        """Notes what was seen, and stops following."""
        if self._feed is not None:
            self._feed.stop()
            self._feed = None
        self._note_seen()

    def _note_seen(self) -> None:
        self._noted = self.now()
        if not self._digested:
            return
        if self.session is not None and self.book.known and self.follow:
            newest = self.book.events[-1]["event"] if self.book.events else 0
            seen = prefs.Seen(time=self.now(), step=self.book.head.step, event=newest)
            prefs.remember_seen(str(self.session.folder), seen)

    def forget_session(self, name: str) -> None:
        """It is being deleted."""
        if self.session is not None and self.session.name == name:
            if self._feed is not None:
                self._feed.stop()
            self._feed = self.session = None
            self.book = Book(now=self.now)

    def _places(self) -> list[Place]:
        return [s for stack in self._screen_stacks.values() for s in stack if isinstance(s, Place)]

    def on_heard(self, message: Heard) -> None:
        """News of the open session; what is left of another one's is dropped."""
        if self.session is None or message.folder != str(self.session.folder):
            return
        self.book.take(message.news)
        self._only_now = self._only_now and message.news.only_now
        if not self._draw_due:
            self._draw_due = True
            self.set_timer(DRAW_AFTER, self._draw)

    def _draw(self) -> None:
        self._draw_due = False
        only_now, self._only_now = self._only_now, True
        stack = self._screen_stacks.get(self.current_mode, [])
        for screen in stack:
            if isinstance(screen, Place) and screen.is_mounted:
                screen.draw(only_now=only_now)
        if not self._digested and self.book.known and self.book.series(ALWAYS[0]):
            self._digested = True
            self._show_digest()

    def _tick(self) -> None:
        """Clocks go on between two steps."""
        if self.book.live and not self._draw_due:
            self._draw()
        if self.now() - self._noted > NOTED_EVERY:
            # The terminal may go without a word: what was seen until then was seen.
            threading.Thread(target=self._note_seen, daemon=True).start()

    def _show_digest(self) -> None:
        if self.session is None or not self.follow:
            return
        from rlhf_tui.screens.digest import digest  # noqa: PLC0415 - keeps the start quick

        seen = prefs.load_seen().get(str(self.session.folder))
        rows = digest(self.book, seen) if seen is not None else []
        if rows:
            self.push_screen(Ask("Since you left", rows, [Choice("o", "OK", "ok")]))

    def pick_other(self) -> None:
        """Another session's curves beside these; chosen again, away."""
        names = [s.name for s in find_all(self.root) if s.name != self.book.name]
        if not names:
            self.say(f"there is no other session in {self.root}")
            return
        options = [Option(n, n, "shown" if n in self.view.others else "") for n in names]

        def take(name: str | None) -> None:
            if name is None:
                return
            if self.view.others.pop(name, None) is None:
                try:
                    with Record(find(self.root, name)) as record:
                        self.view.others[name] = {
                            n: Series(record.series(n)) for n in self._charted()
                        }
                except RlhfError as error:
                    self.say(str(error), "error")
            self._only_now = False
            self._draw()

        self.push_screen(Pick("Beside these curves", options), take)

    # -- words ---------------------------------------------------------------------------------

    def say(self, text: str, severity: str = "information") -> None:
        """A notice for some seconds; nothing in it is markup.

        What is only information stands in the line of keys: it covers nothing and costs one line.
        """
        place = self._screen_stacks.get(self.current_mode, [None])[0]
        if severity == "information" and isinstance(place, Place) and place.is_mounted:
            place.query_one(Keys).say(text, NOTICE)
            return
        self.notify(
            sanitise(text), severity=severity, markup=False,  # type: ignore[arg-type]
            timeout=8 if severity == "error" else 4,
        )  # fmt: skip

    def say_later(self, text: str, severity: str = "information") -> None:
        """The same from a thread."""
        self.call_later(self.say, text, severity)

    def remember(self) -> None:
        """Writes the preferences, in a thread: a home over the network may be slow."""
        self.preferences.theme = self.theme
        threading.Thread(
            target=prefs.save, args=(prefs.preferences_file(), self.preferences), daemon=True
        ).start()

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
        from rlhf_tui.screens.help import Help  # noqa: PLC0415 - keeps the start quick

        self.push_screen(Help(self.screen))

    def action_detach(self) -> None:
        """Leaves; the engine goes on."""
        self._leave()
        engine = self.session.engine() if self.session and self.session.is_live() else None
        if engine is not None and self.session is not None:
            name = self.session.name
            self.farewell = (
                f"detached; engine pid {engine.pid} still running; "
                f"reattach with rlhf-tui attach {name}"
            )
        self.exit()

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


def _who() -> str:
    from rlhf_tui.commands.options import who  # noqa: PLC0415 - click need not be there for it

    return who()


def _action(desk: Desk, action: str, node: Any) -> Callable[[], Any]:
    async def run() -> None:
        await desk.run_action(action, node)

    return run


def _setter(desk: Desk, theme: str) -> Callable[[], None]:
    def choose() -> None:
        desk.theme = theme
        desk.remember()

    return choose


def open_app(root: Path, name: str | None, read_only: bool) -> int:
    """Opens the terminal app on a folder of sessions, or on one of them.

    Returns:
        The exit code.
    """
    # A long session is millions of small objects, none of them garbage: looking for some among
    # them took a third of the time to the first curve.
    gc.set_threshold(200_000, 20, 20)
    desk = Desk(root, name, read_only=read_only)
    desk.run()
    if desk.farewell:
        print(one_line(desk.farewell))  # noqa: T201
    return desk.return_code or 0
