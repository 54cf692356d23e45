"""The app as far as it follows a session: what is open, what is known of it, when it is drawn."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.errors import RlhfError
from engine.metrics import BETA, KL, SCORE
from engine.session.folder import Session, find
from rlhf_tui.app import preferences as prefs
from rlhf_tui.app.sequential_keys import SequentialKeys
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.state.feed import Feed
from rlhf_tui.state.messages import SessionUpdated
from rlhf_tui.state.session_state import ALWAYS, SessionState
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.text import sanitise
from rlhf_tui.widgets.key_footer import KeyFooter

DRAW_AFTER = 0.04
"""Seconds in which news that comes together is drawn together."""
TICK = 1.0
NOTICE = 5.0
NOTED_EVERY = 30.0


class Follower(SequentialKeys, inherit_bindings=False):
    """Holds the state, and says things; what the operator can do comes on top."""

    def __init__(
        self,
        root: Path,
        *,
        read_only: bool,
        now: Callable[[], float],
        follow: bool,
        preferences: prefs.Preferences,
    ) -> None:
        """On a folder of sessions, none of them open.

        Args:
            root: the folder.
            read_only: no commands.
            now: the clock.
            follow: False reads each session once and no more.
            preferences: the operator's.
        """
        super().__init__()
        self.animation_level = "none"
        self.root = root.resolve()
        self.read_only = read_only
        self.now = now
        self.follow = follow
        self.preferences = preferences
        self.who = _who()
        self.session: Session | None = None
        self.state = SessionState(now=now)
        self.view = self._new_view()
        self._feed: Feed | None = None
        self._draw_due = False
        self._only_now = True
        """Since the last drawing nothing has changed but what the ranks do now."""
        self._digested = True
        self._noted = now()

    # -- the open session ----------------------------------------------------------------------

    def take_session(self, session: Session) -> None:
        """Makes a session the open one; :meth:`begin` follows it."""
        self.leave()
        self.session = session
        self.state = SessionState(session.name, now=self.now)
        self.view = self._new_view()
        self._digested = False
        folder = str(session.folder)
        names = [*self.preferences.metrics(), *ALWAYS]
        self._feed = Feed(
            session, self.who, names, lambda news: self.post_message(SessionUpdated(folder, news))
        )

    def begin(self) -> None:
        """Follows the open session from now on."""
        if self._feed is None:
            return
        if self.follow:
            self._feed.start()
        else:
            self._feed.read_all()
        self._read_config()

    def _read_config(self) -> None:
        """What the journal does not say; without it the run can still be seen."""
        try:
            if self.session is not None:
                self.state.batch_size = self.session.config().rollout.batch_size
        except (RlhfError, OSError) as error:
            self.say(str(error), "error")

    def open_session(self, name: str) -> bool:
        """Follows another session and shows its dashboard; False where there is none."""
        if self.session is None or self.session.name != name or self._feed is None:
            try:
                session = find(self.root, name)
            except RlhfError as error:
                self.say(str(error), "error")
                return False
            self.take_session(session)
            for screen in self._places():
                if screen.is_mounted:
                    screen.session_changed()
            self.begin()
        self.switch_mode("dashboard")
        return True

    def _new_view(self) -> Viewport:
        return Viewport(weight=self.preferences.weight, past=self.preferences.past)

    def want(self, specs: Iterable[str]) -> None:
        """Reads the metrics of new charts."""
        if self._feed is not None:
            self._feed.want(n.strip() for spec in specs for n in spec.split(" + "))

    def leave(self) -> None:
        """Notes what was seen, and stops following."""
        if self._feed is not None:
            self._feed.stop()
            self._feed = None
        self._note_seen()

    def _note_seen(self) -> None:
        self._noted = self.now()
        if not self._digested:
            return
        if self.session is not None and self.state.known and self.follow:
            newest = self.state.events[-1].event if self.state.events else 0
            seen = prefs.Seen(time=self.now(), step=self.state.head.step, event=newest)
            prefs.remember_seen(str(self.session.folder), seen)

    def forget_session(self, name: str) -> None:
        """It is being deleted."""
        if self.session is not None and self.session.name == name:
            if self._feed is not None:
                self._feed.stop()
            self._feed = self.session = None
            self.state = SessionState(now=self.now)

    def _places(self) -> list[SessionScreen]:
        return [
            s
            for stack in self._screen_stacks.values()
            for s in stack
            if isinstance(s, SessionScreen)
        ]

    def on_session_updated(self, message: SessionUpdated) -> None:
        """News of the open session; what is left of another one's is dropped."""
        if self.session is None or message.folder != str(self.session.folder):
            return
        self.state.take(message.news)
        self._only_now = self._only_now and message.news.only_live
        if not self._draw_due:
            self._draw_due = True
            self.set_timer(DRAW_AFTER, self._draw)

    def _draw(self) -> None:
        self._draw_due = False
        only_live, self._only_now = self._only_now, True
        stack = self._screen_stacks.get(self.current_mode, [])
        for screen in stack:
            if isinstance(screen, SessionScreen) and screen.is_mounted:
                screen.draw(only_live=only_live)
        if not self._digested and can_be_told(self.state):
            self._digested = True
            self._show_digest()

    def draw_all(self) -> None:
        """Draws everything again, for something else than news has changed."""
        self._only_now = False
        self._draw()

    def tick(self) -> None:
        """Clocks go on between two steps."""
        if self.state.live and not self._draw_due:
            self._draw()
        if self.now() - self._noted > NOTED_EVERY:
            # The terminal may go without a word: what was seen until then was seen.
            threading.Thread(target=self._note_seen, daemon=True).start()

    def _show_digest(self) -> None:
        if self.session is None or not self.follow:
            return
        # Imported here to keep the start quick.
        from rlhf_tui.app.digest import digest  # noqa: PLC0415
        from rlhf_tui.dialogs.base import Choice, ChoiceDialog  # noqa: PLC0415

        seen = prefs.load_seen().get(str(self.session.folder))
        rows = digest(self.state, seen) if seen is not None else []
        if rows:
            self.push_screen(ChoiceDialog("Since you left", rows, [Choice("o", "OK", "ok")]))

    # -- words ---------------------------------------------------------------------------------

    def say(self, text: str, severity: str = "information") -> None:
        """A notice for some seconds; nothing in it is markup.

        What is only information stands in the line of keys: it covers nothing and costs one line.
        """
        place = self._screen_stacks.get(self.current_mode, [None])[0]
        if severity == "information" and isinstance(place, SessionScreen) and place.is_mounted:
            place.query_one(KeyFooter).say(text, NOTICE)
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


def can_be_told(state: SessionState) -> bool:
    """Whether a digest would find its curves: those of a long run are read one after another."""
    return bool(state.names) and all(
        name in state.curves for name in (SCORE, KL, BETA) if name in state.names
    )


def _who() -> str:
    from rlhf_tui.identity import who  # noqa: PLC0415 - click need not be there for it

    return who()
