"""What the operator has seen of a session, and the digest: what happened since then."""

import threading
from collections.abc import Callable

from engine import metrics
from engine.journal.rows import CommandEvent, CommandRow, ErrorEvent, StateEvent
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.state import preferences as prefs
from rlhf_tui.state.curves import RECENT_STEPS
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.preferences import Seen
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import (
    MARKER_GLYPHS,
    MARKER_TONES,
    Marker,
    command_text,
    effect_text,
    in_app,
)
from rlhf_tui.widgets.lines import Row

MAX_ENTRIES = 8
MAX_ANNOUNCED = 3
"""Alerts and failures that are announced at once."""
MIN_ABSENCE = 60.0
"""Minimum seconds of absence for which a digest is shown."""
SAVE_INTERVAL = 30.0


class Visit:
    """Shows the digest of the time since the last visit to a session; saves what this one sees."""

    def __init__(
        self, session: SessionFolder, state: SessionState, now: Callable[[], float]
    ) -> None:
        """The session was opened.

        Args:
            session: the session.
            state: what is shown of it.
            now: the wall clock.
        """
        self._folder = str(session.folder)
        self._state = state
        self._now = now
        self._opened = self._saved = now()
        self._read = 0
        """Id of the newest event that was read."""
        self._digest_shown = False

    def digest(self) -> list[Row]:
        """The lines of the digest; empty if it was returned before, or its curves are not read."""
        if self._digest_shown or not curves_are_read(self._state):
            return []
        self._digest_shown = True
        seen = prefs.load_seen().get(self._folder)
        return digest(self._state, seen) if seen is not None else []

    def news(self, update: SessionUpdate) -> list[Marker]:
        """The newest alerts and failures of an update that the state has just taken.

        Those from before the session was opened are in the digest.
        """
        if not update.events:
            return []
        before, self._read = self._read, update.events[-1].event
        return [
            marker
            for marker in self._state.timeline.entries()
            if marker.kind in ("alert", "crash")
            and marker.event is not None
            and marker.event.event > before
            and (self._digest_shown or marker.time >= self._opened)
        ][-MAX_ANNOUNCED:]

    def save(self) -> None:
        """Saves what was seen, if it was; what happened before the digest counts as not seen."""
        self._saved = self._now()
        state = self._state
        if not self._digest_shown or not state.known:
            return
        seen = Seen(
            time=self._saved,
            step=state.head.step,
            event=state.timeline.events[-1].event if state.timeline.events else 0,
            began=began(state),
            pending=[command.id for command in state.timeline.pending()],
        )
        prefs.remember_seen(self._folder, seen)

    def save_regularly(self) -> None:
        """Call it often. The terminal may disappear at any time."""
        if self._now() - self._saved > SAVE_INTERVAL:
            threading.Thread(target=self.save, daemon=True).start()


def digest(state: SessionState, seen: Seen) -> list[Row]:
    """Returns the lines of a dialog; empty if nothing happened, or `seen` is of another session."""
    if seen.began and (start := began(state)) and start != seen.began:
        return []  # of a session that had this folder before
    away = state.now() - seen.time
    new = [e for e in state.timeline.events if e.event > seen.event]
    steps = state.head.step - seen.step
    commands = _commands(state, seen)
    if 0 <= away < MIN_ABSENCE or (steps == 0 and not new and not commands):
        return []
    heading: Row = [("the run is ", "dim"), (state.head.state, "strong")]
    if away >= 0:  # unknown if the clock was set back
        absence: Row = [("you were away ", "dim"), (fmt.duration(away), "strong"), ("; ", "dim")]
        heading = [*absence, *heading]
    rows = [heading, *_progress(state, seen)]
    for part in (commands, _entries(state, seen)):
        if part:
            rows += [[], *part]
    states = [e.payload for e in new if isinstance(e.payload, StateEvent | ErrorEvent)]
    if states and states[-1].text:
        rows.append([(states[-1].text.partition("\n")[0], "warn")])
    return rows


def began(state: SessionState) -> float:
    """The time of the session's first event; 0 if unknown."""
    first = state.timeline.events[0] if state.timeline.events else None
    return first.time if first is not None and first.event == 1 else 0.0


def _progress(state: SessionState, seen: Seen) -> list[Row]:
    """The steps since then, and score, KL and beta before and after them."""
    then, now = seen.step, state.head.step
    if now == then:
        return []
    if now < then:  # by a roll back, or because the run was resumed after a crash
        return [[(f"back to step {now}, from step {then}", "warn")]]
    rows: list[Row] = [[(f"steps {then} → {now}", "strong")]]
    for name, label in ((metrics.SCORE, "score"), (metrics.KL, "KL"), (metrics.BETA, "beta")):
        series = state.curves.series(name)
        old, new = (
            # A setting has a value, whatever it was before.
            series.latest(step) if metrics.describe(name).is_set
            else series.mean(step - RECENT_STEPS + 1, step)
            for step in (then, now)
        )  # fmt: skip
        rows.append([(f"  {label:<6}", "dim"), (f"{fmt.number(old)} → {fmt.number(new)}", "")])
    return rows


def _entries(state: SessionState, seen: Seen) -> list[Row]:
    """The newest entries of the timeline since then, and how many more there are."""
    since = [m for m in state.timeline.markers() if m.after > seen.event]
    saved = [m for m in since if m.kind == "checkpoint"]
    if len(since) > MAX_ENTRIES and len(saved) > 1:
        # There may be dozens, which must not keep an alert or a crash from being seen.
        since = [m for m in since if m not in saved[:-1]]
    rows = [_row(marker) for marker in since[-MAX_ENTRIES:]]
    if len(since) > MAX_ENTRIES:
        rows.append([(f"       and {len(since) - MAX_ENTRIES} earlier", "dim")])
    if len(saved) > 1 and saved[0] not in since:
        rows.append([(f"       and {fmt.plural(len(saved) - 1, 'earlier checkpoint')}", "dim")])
    return rows


def _row(marker: Marker) -> Row:
    return [
        (f"{marker.step:>6} ", "dim"),
        (f"{MARKER_GLYPHS[marker.kind]} ", MARKER_TONES[marker.kind]),
        (in_app(marker.text), ""),
        (_by(marker.who), "dim"),
    ]


def _by(who: str) -> str:
    return f"  by {who}" if who else ""


def _commands(state: SessionState, seen: Seen) -> list[Row]:
    """The commands that were pending, and newer ones that are, or that were rejected later.

    Those that were applied since are entries of the timeline.
    """
    events = (e.payload for e in state.timeline.events if e.event > seen.event)
    newer = {payload.id for payload in events if isinstance(payload, CommandEvent)}
    rows = [
        _command_row(command, live=state.live)
        for command in state.timeline.commands
        if command.id in seen.pending
        or (command.id in newer and command.accepted and command.status != "applied")
    ]
    if len(rows) > MAX_ENTRIES:
        left = fmt.plural(len(rows) - MAX_ENTRIES, "earlier command")
        rows = [*rows[-MAX_ENTRIES:], [(f"       and {left}", "dim")]]
    return rows


def _command_row(command: CommandRow, *, live: bool) -> Row:
    """A command and how it ended; one that has not cannot end without an engine."""
    step, mark = "", ("⧗ ", "warn")
    match command.status:
        case "applied":
            applied = command.applied_step or 0
            step, mark = str(applied or ""), ("◆ ", "accent")
            end = (effect_text(command.command, applied) if applied else "") or "applied"
        case "rejected":
            mark, end = ("✗ ", "bad"), f"rejected: {command.reason}"
        case _:
            end = "still pending" if live else "not carried out: the engine has ended"
    return [
        (f"{step:>6} ", "dim"),
        mark,
        (command_text(command), ""),
        (f"  {end}", ""),
        (_by(command.who), "dim"),
    ]


def curves_are_read(state: SessionState) -> bool:
    """Whether the curves of a digest are read. Those of a long run are read one after another."""
    return bool(state.curves.names) and all(
        state.curves.is_read(name)
        for name in (metrics.SCORE, metrics.KL, metrics.BETA)
        if name in state.curves.names
    )
