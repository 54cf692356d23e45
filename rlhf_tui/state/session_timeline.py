"""The events and commands of the open session, and the timeline that is built from them."""

from engine.journal.rows import CommandRow, EventRow
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate, newest_events
from rlhf_tui.state.marked_steps import MarkedSteps
from rlhf_tui.state.timeline import Marker, folded, pause_reason, sender, timeline


class SessionTimeline:
    """Filled by :meth:`take`. What is built from the events is kept until they change."""

    def __init__(self, head: SessionSummary) -> None:
        """Without events; `head`: the summary of the session, until an update has one."""
        self.events: list[EventRow] = []
        self.commands: list[CommandRow] = []
        self._head = head
        self._reached: dict[int, int] = {}
        """Attempt → its last step, where a later attempt replaced that step."""
        self._entries: list[Marker] | None = None
        self._folded: list[list[Marker]] | None = None
        self._markers: list[Marker] | None = None
        self._marked_steps: MarkedSteps | None = None

    def take(self, update: SessionUpdate) -> None:
        """Adds an update."""
        if self._is_changed_by(update):
            self._entries = self._folded = self._markers = self._marked_steps = None
        if update.head is not None:
            self._head = update.head
        if update.events:
            self.events = newest_events(self.events + update.events)
        if update.commands is not None:
            self.commands = update.commands
        for rows in update.past.values():
            last_steps = {attempt: step for attempt, step, _ in rows}  # in ascending order
            for attempt, step in last_steps.items():
                self._reached[attempt] = max(self._reached.get(attempt, 0), step)

    def _is_changed_by(self, update: SessionUpdate) -> bool:
        """Whether the timeline must be rebuilt. Most steps do not change it."""
        if update.events or update.past or update.commands is not None:
            return True
        now, then = update.head, self._head
        return now is not None and (now.attempts, now.state) != (then.attempts, then.state)

    def entries(self) -> list[Marker]:
        """The entries of the timeline, oldest first, including abandoned branches."""
        if self._entries is None:
            head = self._head
            self._entries = timeline(
                self.events,
                self.commands,
                head.attempts,
                reached=self._reached,
                crashed_at=head.step if head.state == "crashed" else None,
            )
        return self._entries

    def folded(self) -> list[list[Marker]]:
        """:meth:`entries`, newest first; checkpoints with nothing between them are together."""
        if self._folded is None:
            self._folded = folded(self.entries())[::-1]
        return self._folded

    def markers(self) -> list[Marker]:
        """The entries that the charts show, by step."""
        if self._markers is None:
            shown = [m for m in self.entries() if m.kind != "end" and m.step >= 1]
            self._markers = sorted(shown, key=lambda m: m.step)
        return self._markers

    def marked_steps(self) -> MarkedSteps:
        """The steps of :meth:`markers`, by kind."""
        if self._marked_steps is None:
            self._marked_steps = MarkedSteps(self.markers())
        return self._marked_steps

    def pending(self) -> list[CommandRow]:
        """Commands that have not ended."""
        return [c for c in self.commands if c.status in ("queued", "accepted")]

    def pause_reason(self) -> str | None:
        """What paused the run; None if a person did, or if it is not paused."""
        head = self._head
        return head.pause_reason or pause_reason(head.state, self.events, self.commands)

    def beta_source(self, *, short: bool = False) -> str:
        """Where the beta in force comes from."""
        manual = next((c for c in reversed(self.commands) if self._sets_beta(c)), None)
        adaptive = self._head.settings.get("controller") == "adaptive"
        if manual is not None:
            person, step = sender(manual.who), manual.applied_step
            if short:
                return f"{person} @{step}"
            if adaptive:
                return f"continues from {person}'s, step {step}"
            return f"set by {person} at step {step}"
        return "controller" if adaptive else "configuration"

    def _sets_beta(self, command: CommandRow) -> bool:
        """Whether a command up to now changed beta, or fixed it where the controller had moved it.

        After a restart, a command that was applied may follow later.
        """
        return (
            command.status == "applied"
            and command.live
            and (command.applied_step or 0) <= self._head.step + 1
            and any(
                change.key == "beta"
                or (change.key == "controller" and change.new == "fixed" != change.old)
                for change in command.changes
            )
        )
