"""Follows the open session: reads it, keeps its state and draws it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from textual.app import App
from textual.notifications import SeverityLevel

from engine.errors import RlhfError
from engine.session.folder import SessionFolder
from rlhf_tui.app.digest import began, curves_are_read, digest
from rlhf_tui.app.replaying import ReplayControls
from rlhf_tui.dialogs.digest import DigestDialog
from rlhf_tui.screens.context import Origin, Say
from rlhf_tui.state import preferences as prefs
from rlhf_tui.state.command_sender import UNCHANGED_READINGS
from rlhf_tui.state.feeds.feed import Feed, SessionFeed
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.messages import SessionUpdated
from rlhf_tui.state.replay.player import Player, ReplayOptions
from rlhf_tui.state.session_state import ALWAYS, SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, in_app
from rlhf_tui.state.viewport import Viewport

DRAW_AFTER = 0.04
"""Seconds during which updates are collected before they are drawn."""
TICK = 1.0
"""Seconds between two calls of :meth:`SessionFollower.tick`."""
SAVE_SEEN_INTERVAL = 30.0
MOST_ANNOUNCED = 3
"""Notices of events that are read at once."""
SEVERITIES: dict[str, SeverityLevel] = {"alert": "warning", "crash": "error"}
"""Kinds of events that are announced."""


class DrawScreens(Protocol):
    """Draws the screens that are visible."""

    def __call__(self, *, only_live: bool) -> None:
        """`only_live`: only the phases and the machine have changed."""


class SessionFollower:
    """Holds the open session, its feed, its state and the viewport of its charts."""

    def __init__(
        self,
        app: App[None],
        preferences: prefs.Preferences,
        who: str,
        *,
        now: Callable[[], float],
        follow: bool,
        say: Say,
        draw: DrawScreens,
        root: Path,
        replay: ReplayOptions | None,
        origin: Origin | None,
    ) -> None:
        """Opens no session yet.

        Args:
            app: takes the feed's messages, and has timers and dialogs.
            preferences: the operator's.
            who: the operator.
            now: the wall clock.
            follow: False reads each session once and never again.
            say: shows a notice.
            draw: draws the visible screens.
            root: the folder of sessions.
            replay: replays sessions from their beginning; the first one that is opened from the
                step of these options. None: shows them as they are.
            origin: the session that the open one is a copy of; None if it is not a copy.
        """
        self._app = app
        self._preferences = preferences
        self._who = who
        self._now = now
        self._follow = follow
        self._say = say
        self._draw_screens = draw
        self._root = root
        self._replay_options = replay
        self._origin = origin
        self.session: SessionFolder | None = None
        self.state = SessionState(now=now, root=root)
        self.view = self._new_view()
        self._feed: SessionFeed | None = None
        self.replay: ReplayControls | None = None
        """The keys of the replay of the open session; None without a replay."""
        self._draw_due = False
        self._only_live = True
        """Whether only phases and machine have changed since the last drawing."""
        self._digest_shown = True
        self._opened = now()
        self._announced = 0
        """Id of the newest event that was read."""
        self._seen_saved = now()

    # -- the open session ----------------------------------------------------------------------

    def follows(self, name: str) -> bool:
        """Whether the session of this name is open."""
        return self._feed is not None and self.session is not None and self.session.name == name

    def open(self, session: SessionFolder) -> None:
        """Makes a session the open one; :meth:`begin` starts to read it."""
        self.leave()
        self.session = session
        self.state = SessionState(session.name, now=self._time, root=self._root)
        self.view = self._new_view()
        self._digest_shown = self._replay_options is not None
        self._opened, self._announced = self._now(), 0
        folder, app = str(session.folder), self._app
        names = [*self._preferences.metrics(), *ALWAYS]

        def post(update: SessionUpdate) -> None:
            app.post_message(SessionUpdated(folder, update))

        if self._replay_options is None:
            self._feed = Feed(session, self._who, names, post)
            return
        from rlhf_tui.state.replay.feed import ReplayFeed  # noqa: PLC0415 - keeps start-up short

        player = Player(self._replay_options.speed)
        feed = ReplayFeed(session, player, names, post, self._replay_options.from_step)
        self._feed, self.replay = feed, ReplayControls(player, feed, self._say)
        self._replay_options = msgspec.structs.replace(self._replay_options, from_step=0)

    def _time(self) -> float:
        """The wall clock; in a replay, that of the displayed moment."""
        replay = self.state.replay
        return self._now() if replay is None else replay.position.time

    def begin(self) -> None:
        """Starts to read the open session."""
        if self._feed is None:
            return
        if self._follow:
            self._feed.start()
            self._read_config(self._feed)
        else:
            self._read_config(self._feed)
            self._feed.read_all()

    def _read_config(self, feed: SessionFeed) -> None:
        """Reads what the journal does not contain. Without it the run can still be shown."""
        try:
            if self.session is not None:
                config, state = self.session.config(), self.state
                state.batch_size = config.rollout.batch_size
                state.eval_every = config.eval.every
                state.best_metric = config.train.best_metric
                state.keep_last = config.train.keep_last
                state.keep_best = config.train.keep_best
                feed.want([state.best_metric])
        except (RlhfError, OSError) as error:
            self._say(str(error), "error")

    def _new_view(self) -> Viewport:
        return Viewport(weight=self._preferences.weight, past=self._preferences.past)

    def read_metrics(self) -> None:
        """Reads the metrics of the charts in the preferences, which have changed."""
        if self._feed is not None:
            self._feed.want(self._preferences.metrics())

    def command_ended(self) -> None:
        """Call this when a command was applied: others may have reverted it before it was read."""
        if isinstance(self._feed, Feed):
            self._feed.repeat_summary(UNCHANGED_READINGS)

    def leave(self) -> None:
        """Stops following, and saves what was seen."""
        if self._feed is not None:
            self._feed.stop()
            self._feed = None
        self._save_seen()

    def forget(self, name: str) -> None:
        """Stops following a session that is about to be deleted."""
        if self.session is not None and self.session.name == name:
            if self._feed is not None:
                self._feed.stop()
            self._feed = self.session = None
            self.state = SessionState(now=self._now, root=self._root)

    # -- updates -------------------------------------------------------------------------------

    def take(self, message: SessionUpdated) -> bool:
        """Adds an update to the state and schedules drawing; False if it is for another session."""
        if self.session is None or message.folder != str(self.session.folder):
            return False
        self.state.take(message.update)
        self._announce(message.update)
        if message.update.replay is not None:
            self.session = self.session.at(message.update.replay.position)
        self._only_live = self._only_live and message.update.only_live
        if not self._draw_due:
            self._draw_due = True
            self._app.set_timer(DRAW_AFTER, self._draw)
        return True

    def _announce(self, update: SessionUpdate) -> None:
        """Shows alerts and failures that were just recorded: only the dashboard lists them.

        Those from before the session was opened are in the digest.
        """
        if not update.events:
            return
        before, self._announced = self._announced, update.events[-1].event
        if self._replay_options is not None:
            return
        news = [
            marker
            for marker in self.state.timeline()
            if marker.kind in SEVERITIES
            and marker.event is not None
            and marker.event.event > before
            and (self._digest_shown or marker.time >= self._opened)
        ]
        for marker in news[-MOST_ANNOUNCED:]:
            sign = MARKER_GLYPHS[marker.kind]
            self._say(f"{sign} step {marker.step}: {in_app(marker.text)}", SEVERITIES[marker.kind])

    def _draw(self) -> None:
        self._draw_due = False
        only_live, self._only_live = self._only_live, True
        self._draw_screens(only_live=only_live)
        if not self._digest_shown and curves_are_read(self.state):
            self._digest_shown = True
            self._show_digest()

    def tick(self) -> None:
        """Draws the clocks, which advance between two updates."""
        stale = "" if self._origin is None else self._origin.stale
        changed, self.state.stale = stale != self.state.stale, stale
        if (self.state.live or changed) and not self._draw_due:
            self._draw()
        if self._now() - self._seen_saved > SAVE_SEEN_INTERVAL:
            # The terminal may disappear at any time, so what was seen is saved regularly.
            threading.Thread(target=self._save_seen, daemon=True).start()

    # -- what the operator has seen ------------------------------------------------------------

    def _save_seen(self) -> None:
        self._seen_saved = self._now()
        if not self._digest_shown:
            return
        shown_now = self._follow and self._replay_options is None
        if self.session is not None and self.state.known and shown_now:
            newest = self.state.events[-1].event if self.state.events else 0
            seen = prefs.Seen(
                time=self._now(),
                step=self.state.head.step,
                event=newest,
                began=began(self.state),
                pending=[command.id for command in self.state.pending()],
            )
            prefs.remember_seen(str(self.session.folder), seen)

    def _show_digest(self) -> None:
        if self.session is None or not self._follow:
            return
        seen = prefs.load_seen().get(str(self.session.folder))
        rows = digest(self.state, seen) if seen is not None else []
        if rows:
            title = f"{self.session.name} since you left"
            self._app.push_screen(DigestDialog(title, rows))
