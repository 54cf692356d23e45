"""What the engines of the listed sessions wait for."""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from engine.session.folder import SessionFolder
from rlhf_tui.state.messages import EnginesAsked
from rlhf_tui.state.runs.session_row import ListedSession, SessionRow, awaited

STILL_SECONDS = 10.0
"""Seconds without a step after which an engine is asked what it waits for."""


class EngineWaits:
    """Asks engines that are not making progress what they wait for, in a thread."""

    def __init__(self, post: Callable[[EnginesAsked], object]) -> None:
        """`post` is called with the answers, from another thread; :meth:`take` takes them."""
        self._post = post
        self._waits: dict[str, str] = {}
        """What engines wait for, by the names of their sessions."""
        self._asking = False

    def ask(self, rows: Iterable[SessionRow], now: float) -> None:
        """Asks the engines of these sessions that stand still, unless some are being asked."""
        still = [
            row
            for row in rows
            if row.pid
            and row.state != "paused"
            and (row.updated is None or now - row.updated > STILL_SECONDS)
        ]
        self._waits = {r.name: self._waits[r.name] for r in still if r.name in self._waits}
        if not still or self._asking:
            return
        self._asking = True

        def ask() -> None:
            found = {row.name: awaited(SessionFolder(Path(row.folder))) for row in still}
            self._post(EnginesAsked({name: text for name, text in found.items() if text}))

        threading.Thread(target=ask, daemon=True, name="ask").start()

    def take(self, message: EnginesAsked) -> None:
        """Takes the answers."""
        self._asking, self._waits = False, message.waits

    def added_to(self, sessions: Mapping[str, ListedSession]) -> dict[str, ListedSession]:
        """The sessions, by name, with what their engines wait for."""
        return {
            name: msgspec.structs.replace(
                listed, row=msgspec.structs.replace(listed.row, waits_for=self._waits.get(name))
            )
            for name, listed in sessions.items()
        }
