"""What the parts of a supervisor share: a live session's collaborators, and how things stand."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import configfile
from engine.attempt import Attempt, Pace
from engine.config import RunConfig
from engine.guardrails import Guardrails
from engine.herald import Herald, Observer
from engine.journal import Journal
from engine.launcher import Ranks
from engine.orders import Orders
from engine.protocol import Failed, Phase
from engine.server import Server
from engine.session import Session
from engine.settings import first_settings
from engine.start import Start
from engine.watch import Watchman

log = logging.getLogger("engine")


@dataclass
class Live:
    """One live session; changed in the event loop's thread alone."""

    session: Session
    config: RunConfig
    journal: Journal
    server: Server
    orders: Orders
    herald: Herald
    ranks: Ranks
    watchman: Watchman
    guardrails: Guardrails
    settings: dict[str, Any]
    """In force, by name."""
    attempt: Attempt
    """The one that goes on, or the last."""
    next: Start | None
    """Of the attempt that follows."""
    paused: bool = False
    stopping: bool = False
    stop_now: bool = False
    """Stopping, without another save."""
    began: bool = False
    """Something was trained, or could have been."""
    phases: dict[int, Phase] = field(default_factory=dict)
    """What each rank does."""
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def of(
        cls,
        session: Session,
        config: RunConfig,
        journal: Journal,
        socket: Path,
        start: Start,
        observer: Observer | None,
    ) -> "Live":
        """A session whose engine has not begun yet.

        Args:
            session: its lock is held.
            config: what it runs by.
            journal: opened for writing.
            socket: where ranks and clients find the server.
            start: of the first attempt.
            observer: told what happens, in this process.
        """
        server = Server()
        return cls(
            session=session,
            config=config,
            journal=journal,
            server=server,
            orders=Orders(journal, server),
            herald=Herald(session.name, journal, server, config.notify.command, observer),
            ranks=Ranks(session, socket, config.launch),
            watchman=Watchman(session, config, journal, server),
            guardrails=Guardrails(config.guardrails),
            settings=configfile.as_mapping(first_settings(config)),
            attempt=Attempt(start),
            next=start,
        )

    def fail(self, text: str, rank: int = 0, *, final: bool = False) -> None:
        """Ends the attempt for a reason that no rank gave; a final one is not tried again."""
        self.attempt.failure = Failed(rank=rank, text=text, final=final)
        self.ranks.kill()

    def give_up(self, error: BaseException) -> None:
        """The journal cannot be written, a rank speaks nonsense: something that must not go on."""
        log.error("cannot go on", exc_info=error)
        self.fail(f"{type(error).__name__}: {error}", final=True)
