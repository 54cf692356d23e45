"""Publishes events: first to the journal, then to clients, channels and the observer."""

import logging
from dataclasses import replace
from typing import Any, Protocol

from engine.journal.writer import JournalWriter
from engine.monitoring.channels.message import of_alert, of_state
from engine.monitoring.guardrails import Alert
from engine.monitoring.notify import Notifier
from engine.protocol.rank_messages import FromRank, Phase, StepReport
from engine.session.states import State, is_legal
from engine.supervisor.server import Server

log = logging.getLogger("engine")


class Observer(Protocol):
    """Follows a session from inside the supervisor's process. Its methods must not raise."""

    def state(self, state: str, text: str) -> None:
        """The session's state changed; `text` is the reason, or empty."""

    def alert(self, text: str, step: int) -> None:
        """An alert was published."""

    def message(self, message: FromRank) -> None:
        """A rank sent a message. The journal has its content already."""


class EventPublisher:
    """Publishes states, alerts and messages; owns the session's state while its engine lives."""

    def __init__(
        self,
        name: str,
        journal: JournalWriter,
        server: Server,
        notifier: Notifier,
        observer: Observer | None,
    ) -> None:
        """Stores the receivers.

        Args:
            name: the session's name, for channels.
            journal: records every state and alert.
            server: notifies connected clients.
            notifier: sends alerts and the states that operators wait for.
            observer: called after the journal is written.
        """
        self._name, self._journal, self._server = name, journal, server
        self._notifier, self._observer = notifier, observer
        self._state: State | None = None
        self._recorded = True
        """Whether the journal has the state; false after it could not be written."""
        self._notified_reasons: set[str] = set()
        """Reasons of pauses whose alert was sent: a notification of the pause would repeat it."""

    @property
    def state(self) -> State:
        """The session's state; `starting` even before the first attempt begins."""
        return self._state or "starting"

    def set_state(self, state: State, text: str = "") -> None:
        """Changes the session's state; does nothing if it is already the recorded state.

        `text` is the reason, such as what failed or what paused the run.

        A transition that is not in :data:`~engine.session.states.TRANSITIONS` is a bug in the
        supervisor. It is logged as an error but still made, so that the training continues.
        """
        if state == self._state:
            if not self._recorded:
                self._record_state(state, text)
            return
        if not is_legal(self._state, state):
            log.error("illegal transition of the session's state: %s → %s", self._state, state)
        self._state = state
        try:
            self._record_state(state, text)
        finally:
            # A journal that cannot be written, as on a full disk, is what an operator must hear of.
            message = of_state(self._name, state, text, self._journal.step)
            repeated = state == "paused" and text in self._notified_reasons
            if message is not None and not repeated:
                self._notifier.submit(message)
        self._server.notify_watchers()
        if self._observer is not None:
            self._observer.state(state, text)

    def _record_state(self, state: State, text: str) -> None:
        self._recorded = False
        data: dict[str, Any] = {"state": state, "text": text}
        paused = state == "paused"
        self._journal.set_meta(
            state=state,
            message="" if paused else text,
            pause_reason=(text or None) if paused else None,
        )
        self._journal.record_event("state", data)
        self._recorded = True

    def alert(self, alert: Alert) -> None:
        """Publishes an alert. Its action is carried out by the command handler, not here."""
        self._journal.record_event("alert", alert.as_data(), alert.step)
        if self._observer is not None:
            self._observer.alert(alert.text, alert.step)
        self._server.notify_watchers()
        sent = self._notifier.submit(of_alert(self._name, alert))
        if alert.action == "pause":  # its reason is the cause of a rule's, the text of the ranks'
            reasons = {alert.cause, alert.text}
            self._notified_reasons -= reasons  # of an earlier alert, if the limit keeps this back
            self._notified_reasons |= reasons if sent else set()

    def notify_unrecorded(self, rule: str, text: str) -> None:
        """Notifies operators of a failure that stops the run but cannot be recorded (full disk)."""
        alert = Alert(rule, "notify", text, self._journal.step)
        message = replace(of_alert(self._name, alert), level="error")
        self._notifier.submit(message)

    def notice(self, rule: str, text: str, step: int) -> None:
        """Publishes an alert without an action."""
        self.alert(Alert(rule, "notify", text, step))

    def rows_added(self) -> None:
        """Announces journal rows that other code has written, such as those of a command."""
        self._server.notify_watchers()

    def phase(self, phase: Phase) -> None:
        """Shows a phase to the clients that watch; phases are not in the journal."""
        self._server.send_to_watchers(phase)

    def rank_message(self, message: FromRank) -> None:
        """Publishes a rank's message; call it after the journal is written."""
        if isinstance(message, Phase):
            self.phase(message)
        else:
            self._server.notify_watchers(soon=not isinstance(message, StepReport))
        if self._observer is not None:
            self._observer.message(message)

    async def finish(self) -> None:
        """Waits for the notifications that are being sent."""
        await self._notifier.finish()

    def cancel_notifications(self) -> None:
        """Cancels the notifications that are being sent, so that :meth:`finish` returns."""
        self._notifier.cancel()
