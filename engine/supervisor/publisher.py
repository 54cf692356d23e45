"""Tells how a session stands and what deserves a look: the journal first, then whoever watches."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from engine.journal.writer import JournalWriter
from engine.monitoring.guardrails import Alert
from engine.monitoring.notify import Channel
from engine.protocol.rank_messages import FromRank
from engine.session.states import State, is_legal
from engine.supervisor.server import Server

log = logging.getLogger("engine")


class Observer(Protocol):
    """Sees what happens, as it happens. It must not raise."""

    def state(self, state: str, text: str) -> None:
        """The session's state changed; `text` says why, where there is a why."""

    def alert(self, text: str, step: int) -> None:
        """Something deserves a look."""

    def message(self, message: FromRank) -> None:
        """A rank said something; the journal has it already."""


class EventPublisher:
    """One session's, while its engine lives."""

    def __init__(
        self,
        name: str,
        journal: JournalWriter,
        server: Server,
        channels: Sequence[Channel],
        observer: Observer | None,
    ) -> None:
        """Says nothing yet.

        Args:
            name: the session's.
            journal: where everything is written down first.
            server: wakes those who are connected.
            channels: each is sent every alert.
            observer: in this process.
        """
        self._name, self._journal, self._server = name, journal, server
        self._channels, self._observer = channels, observer
        self._tasks: set[asyncio.Task[None]] = set()
        self._state: State | None = None

    @property
    def state(self) -> State:
        """The session's; `starting` even before the first attempt begins."""
        return self._state or "starting"

    def set_state(self, state: State, text: str = "") -> None:
        """The session is in another state, if it is another one.

        A transition that :data:`~engine.session.states.TRANSITIONS` does not have is a mistake of
        the supervisor's. It is logged as an error, and the training goes on.
        """
        if state == self._state:
            return
        if not is_legal(self._state, state):
            log.error("illegal transition of the session's state: %s → %s", self._state, state)
        self._state = state
        data: dict[str, Any] = {"state": state, "text": text}
        self._journal.set_meta(state=state, message=text)
        self._journal.record_event("state", data)
        self._server.wake()
        if self._observer is not None:
            self._observer.state(state, text)

    def alert(self, alert: Alert) -> None:
        """Something deserves a look; what is to be done about it is not decided here."""
        self._journal.record_event("alert", alert.as_data(), alert.step)
        if self._observer is not None:
            self._observer.alert(alert.text, alert.step)
        self._server.wake()
        for channel in self._channels:
            task = asyncio.create_task(channel.send(self._name, alert))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def notice(self, rule: str, text: str, step: int) -> None:
        """An alert that asks for nothing but a look."""
        self.alert(Alert(rule, "notify", text, step))

    def pass_on(self, message: FromRank) -> None:
        """A rank said something, and the journal has it."""
        if self._observer is not None:
            self._observer.message(message)

    async def finish(self) -> None:
        """Waits until every channel has sent what it was given."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
