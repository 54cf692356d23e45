"""What the parts of a supervisor share: a live session's collaborators, and how things stand."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.config.settings import settings_of
from engine.journal.writer import JournalWriter
from engine.launch.start import StartOptions
from engine.monitoring.guardrails import Guardrails
from engine.protocol.rank_messages import Failed, Phase
from engine.session.folder import Session
from engine.supervisor.attempt import Attempt, StepTimer
from engine.supervisor.pending_commands import PendingCommands
from engine.supervisor.publisher import EventPublisher, Observer
from engine.supervisor.rank_processes import RankProcesses
from engine.supervisor.server import Server
from engine.supervisor.watchdog import Watchdog

log = logging.getLogger("engine")


@dataclass
class SupervisorState:
    """One live session; changed in the event loop's thread alone."""

    session: Session
    config: RunConfig
    journal: JournalWriter
    server: Server
    orders: PendingCommands
    herald: EventPublisher
    ranks: RankProcesses
    watchman: Watchdog
    guardrails: Guardrails
    settings: dict[str, Any]
    """In force, by name."""
    attempt: Attempt
    """The one that goes on, or the last."""
    next: StartOptions | None
    """Of the attempt that follows."""
    paused: bool = False
    stopping: bool = False
    stop_now: bool = False
    """Stopping, without another save."""
    began: bool = False
    """Something was trained, or could have been."""
    phases: dict[int, Phase] = field(default_factory=dict)
    """What each rank does."""
    pace: StepTimer = field(default_factory=StepTimer)

    @classmethod
    def of(
        cls,
        session: Session,
        config: RunConfig,
        journal: JournalWriter,
        socket: Path,
        start: StartOptions,
        observer: Observer | None,
    ) -> "SupervisorState":
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
            orders=PendingCommands(journal, server),
            herald=EventPublisher(session.name, journal, server, config.notify.command, observer),
            ranks=RankProcesses(session, socket, config.launch),
            watchman=Watchdog(session, config, journal, server),
            guardrails=Guardrails(config.guardrails),
            settings=config_file.as_mapping(settings_of(config)),
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
