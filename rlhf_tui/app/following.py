"""Follows the open session: reads it, keeps its state and draws it."""

from typing import Protocol

import msgspec
from textual.app import App
from textual.notifications import SeverityLevel

from engine.errors import RlhfError
from engine.session.folder import SessionFolder
from rlhf_tui.app.digest import Visit
from rlhf_tui.app.replaying import ReplayControls
from rlhf_tui.dialogs.digest import DigestDialog
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.command_sender import UNCHANGED_READINGS
from rlhf_tui.state.feeds.feed import Feed, SessionFeed
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.messages import SessionUpdated
from rlhf_tui.state.replay.player import Player, ReplayOptions
from rlhf_tui.state.session_state import ALWAYS_READ, SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, in_app
from rlhf_tui.state.viewport import Viewport

DRAW_DELAY = 0.04
"""Seconds during which updates are collected before they are drawn."""
TICK_INTERVAL = 1.0
"""Seconds between two calls of :meth:`SessionFollower.tick`."""
SEVERITIES: dict[str, SeverityLevel] = {"alert": "warning", "crash": "error"}
"""Of the notices of alerts and failures."""


class DrawScreens(Protocol):
    """Draws the screens that are visible."""

    def __call__(self, *, only_live: bool) -> None:
        """`only_live`: only the phases and the machine have changed."""


class SessionFollower:
    """Holds the open session, its feed, its state and the viewport of its charts."""

    def __init__(
        self,
        app: App[None],
        context: AppContext,
        *,
        follow: bool,
        replay: ReplayOptions | None,
        draw: DrawScreens,
    ) -> None:
        """Opens no session yet.

        Args:
            app: takes the feed's messages, and has timers and dialogs.
            context: the same app, as screens see it.
            follow: False reads each session once and never again.
            replay: replays sessions from their beginning; the first one that is opened from the
                step of these options. None: shows them as they are.
            draw: draws the visible screens.
        """
        self._app = app
        self._context = context
        self._follow = follow
        self._replay_options = replay
        self._draw_screens = draw
        self.session: SessionFolder | None = None
        self.state = SessionState(now=context.now, root=context.root)
        self.view = self._new_view()
        self._feed: SessionFeed | None = None
        self.replay: ReplayControls | None = None
        """The keys of the replay of the open session; None without a replay."""
        self._visit: Visit | None = None
        """What the operator sees of the open session; None in a replay and if it is read once."""
        self._draw_due = False
        self._only_live = True
        """Whether only phases and machine have changed since the last drawing."""

    # -- the open session ----------------------------------------------------------------------

    def follows(self, name: str) -> bool:
        """Whether the session of this name is open."""
        return self._feed is not None and self.session is not None and self.session.name == name

    def open(self, session: SessionFolder) -> None:
        """Makes a session the open one; :meth:`begin` starts to read it."""
        self.leave()
        self.session = session
        self.state = SessionState(session.name, now=self._time, root=self._context.root)
        self.view = self._new_view()
        self._feed = self._new_feed(session)
        if self._follow and self._replay_options is None:
            self._visit = Visit(session, self.state, self._context.now)

    def _new_feed(self, session: SessionFolder) -> SessionFeed:
        folder, app, context = str(session.folder), self._app, self._context
        names = [*context.preferences.metrics(), *ALWAYS_READ]

        def post(update: SessionUpdate) -> None:
            app.post_message(SessionUpdated(folder, update))

        if self._replay_options is None:
            return Feed(session, context.who, names, post)
        from rlhf_tui.state.replay.feed import ReplayFeed  # noqa: PLC0415 - keeps start-up short

        player = Player(self._replay_options.speed)
        feed = ReplayFeed(session, player, names, post, self._replay_options.from_step)
        self.replay = ReplayControls(player, feed, context.say)
        self._replay_options = msgspec.structs.replace(self._replay_options, from_step=0)
        return feed

    def _time(self) -> float:
        """The wall clock; in a replay, that of the displayed moment."""
        replay = self.state.replay
        return self._context.now() if replay is None else replay.position.time

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
                state.progress.eval_every = config.eval.every
                state.best_metric = config.train.best_metric
                state.keep_last = config.train.keep_last
                state.keep_best = config.train.keep_best
                feed.want([state.best_metric])
        except (RlhfError, OSError) as error:
            self._context.say(str(error), "error")

    def _new_view(self) -> Viewport:
        preferences = self._context.preferences
        return Viewport(weight=preferences.weight, past=preferences.past)

    def read_metrics(self) -> None:
        """Reads the metrics of the charts in the preferences, which have changed."""
        if self._feed is not None:
            self._feed.want(self._context.preferences.metrics())

    def command_ended(self) -> None:
        """Call this when a command was applied: others may have reverted it before it was read."""
        if isinstance(self._feed, Feed):
            self._feed.repeat_summary(UNCHANGED_READINGS)

    def leave(self) -> None:
        """Stops following, and saves what was seen."""
        if self._feed is not None:
            self._feed.stop()
            self._feed = None
        if self._visit is not None:
            self._visit.save()
            self._visit = None

    def forget(self, name: str) -> None:
        """Stops following a session that is about to be deleted."""
        if self.session is not None and self.session.name == name:
            if self._feed is not None:
                self._feed.stop()
            self._feed = self.session = self._visit = None
            self.state = SessionState(now=self._context.now, root=self._context.root)

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
            self._app.set_timer(DRAW_DELAY, self._draw)
        return True

    def _announce(self, update: SessionUpdate) -> None:
        """Shows alerts and failures that were just recorded: only the dashboard lists them."""
        for marker in [] if self._visit is None else self._visit.news(update):
            text = f"{MARKER_GLYPHS[marker.kind]} step {marker.step}: {in_app(marker.text)}"
            self._context.say(text, SEVERITIES[marker.kind])

    def _draw(self) -> None:
        self._draw_due = False
        only_live, self._only_live = self._only_live, True
        self._draw_screens(only_live=only_live)
        if self._visit is not None and (rows := self._visit.digest()):
            self._app.push_screen(DigestDialog(f"{self.state.name} since you left", rows))

    def tick(self) -> None:
        """Draws the clocks, which advance between two updates."""
        origin = self._context.origin
        stale = "" if origin is None else origin.stale
        changed, self.state.stale = stale != self.state.stale, stale
        if (self.state.live or changed) and not self._draw_due:
            self._draw()
        if self._visit is not None:
            self._visit.save_regularly()
