"""Commands that were accepted and wait for the ranks to carry them out."""

from dataclasses import dataclass

from engine.config import file as config_file
from engine.journal.command_log import CommandLog
from engine.protocol.client_messages import PendingCommand
from engine.protocol.commands import BoundaryCommand, Pause, Unpause
from engine.protocol.rank_messages import RankCommand
from engine.supervisor.server import Server

MAX_FAILURES = 2
"""Of the ranks with a command in hand, before it is taken for the cause."""


@dataclass
class _Waiting:
    message: RankCommand
    who: str
    recorded: bool
    """Whether the journal has it."""
    failures: int = 0


class PendingCommands:
    """In the order in which they were given; those who wait for an answer get one in the end."""

    def __init__(self, commands: CommandLog, server: Server) -> None:
        self._commands, self._server = commands, server
        self._waiting: dict[str, _Waiting] = {}

    def add(self, message: RankCommand, who: str, *, recorded: bool = True) -> None:
        """Adds a command; one that is not in the journal is recorded when it ends."""
        self._waiting[message.id] = _Waiting(message, who, recorded)

    def all(self) -> list[RankCommand]:
        """Those that wait, as each attempt's rank 0 is told."""
        return [waiting.message for waiting in self._waiting.values()]

    def pending(self) -> list[PendingCommand]:
        """The same for those who watch."""
        return [
            PendingCommand(id=i, command=w.message.command.name(), who=w.who, status="accepted")
            for i, w in self._waiting.items()
        ]

    def paused_after(self, paused: bool) -> bool:
        """Whether the run is paused once all of them are carried out; `paused`: it is now."""
        for waiting in self._waiting.values():
            if isinstance(waiting.message.command, Pause | Unpause):
                paused = isinstance(waiting.message.command, Pause)
        return paused

    def carried_out(self, command_id: str) -> BoundaryCommand | None:
        """It waits no more; None where it is not known."""
        waiting = self._take(command_id)
        return None if waiting is None else waiting.message.command

    def reject(self, command_id: str, reason: str) -> None:
        """It waits no more, and was not carried out."""
        self._take(command_id)
        self._commands.reject(command_id, reason)
        self._server.tell(self._commands.reply(command_id))

    def _take(self, command_id: str) -> _Waiting | None:
        waiting = self._waiting.pop(command_id, None)
        if waiting is not None and not waiting.recorded:
            command = waiting.message.command
            self._commands.record(
                command_id, command.name(), config_file.as_mapping(command), waiting.who
            )
        return waiting

    def attempt_failed(self) -> None:
        """An attempt failed that had been ready; the command in hand, the first, may be why.

        A single command that no rank survives would take every restart that is left.
        """
        for command_id, waiting in self._waiting.items():
            if not waiting.message.command.dropped_after_failures:
                continue
            waiting.failures += 1
            if waiting.failures == MAX_FAILURES:
                self.reject(command_id, f"the ranks failed {MAX_FAILURES} times with it in hand")
            return

    def run_ended(self) -> None:
        """What is left came too late."""
        for command_id in list(self._waiting):
            self.reject(command_id, "the run ended before it was carried out")
