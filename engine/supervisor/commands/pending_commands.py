"""Commands that are accepted but not yet carried out by the ranks."""

import asyncio
from dataclasses import dataclass

from engine.journal.logs.command_log import CommandLog
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import BoundaryCommand, Command, Pause, Unpause
from engine.protocol.rank_messages import Applied, RankCommand
from engine.supervisor.server import Server

MAX_FAILURES = 2
"""After this many failed attempts with a command pending, the command counts as their cause."""


@dataclass
class _Pending:
    message: RankCommand
    who: str
    recorded: bool
    """Whether the journal has it."""
    failures: int = 0


class PendingCommands:
    """The commands in the order they were accepted. Each ends up applied or rejected."""

    def __init__(self, commands: CommandLog, server: Server) -> None:
        self._commands, self._server = commands, server
        self._pending: dict[str, _Pending] = {}
        self._removed = asyncio.Event()

    def add(self, message: RankCommand, who: str, *, recorded: bool = True) -> None:
        """Adds a command; if the journal does not have it yet, it is recorded when it ends."""
        self._pending[message.id] = _Pending(message, who, recorded)

    def __contains__(self, command_id: str) -> bool:
        return command_id in self._pending

    def ids_of(self, kind: type[Command]) -> list[str]:
        """The ids of the commands of a type."""
        return [i for i, p in self._pending.items() if isinstance(p.message.command, kind)]

    async def wait_for(self, command_ids: list[str]) -> None:
        """Waits until none of these commands is pending any more."""
        while any(i in self._pending for i in command_ids):
            self._removed.clear()
            await self._removed.wait()

    def _remove(self, command_id: str) -> None:
        self._pending.pop(command_id, None)
        self._removed.set()

    def messages(self) -> list[RankCommand]:
        """The messages for rank 0, which each attempt sends again."""
        return [pending.message for pending in self._pending.values()]

    def paused_after(self, paused: bool) -> bool:
        """Whether the run will be paused once all commands are carried out.

        `paused` says whether it is now.
        """
        for pending in self._pending.values():
            if isinstance(pending.message.command, Pause | Unpause):
                paused = isinstance(pending.message.command, Pause)
        return paused

    def applied(self, applied: Applied) -> BoundaryCommand | None:
        """Records that a rank carried out a command, and removes it; None for an unknown id.

        It stays pending if the journal cannot be written: call this again.
        """
        pending = self._recorded(applied.id)
        self._commands.apply(applied.id, applied.step, applied.changes, applied.result)
        self._remove(applied.id)
        return None if pending is None else pending.message.command

    def reject(self, command_id: str, reason: str) -> None:
        """Removes a command that was not carried out, and replies to its client."""
        self._recorded(command_id)
        self._commands.reject(command_id, reason)
        self._remove(command_id)
        self.send_reply(self._commands.reply(command_id))

    def send_reply(self, reply: CommandReply) -> None:
        """Sends a reply to every client that sent the command."""
        self._server.send_reply(reply)

    def _recorded(self, command_id: str) -> _Pending | None:
        pending = self._pending.get(command_id)
        if pending is not None and not pending.recorded:
            command = pending.message.command
            self._commands.record(command_id, command.name(), command.arguments(), pending.who)
        return pending

    def attempt_failed(self) -> None:
        """Counts a failure against the first command; call it for attempts that were ready.

        The ranks were carrying out that command. If no rank survives it, it would otherwise use up
        all remaining restarts.
        """
        for command_id, pending in self._pending.items():
            if not pending.message.command.dropped_after_failures:
                continue
            pending.failures += 1
            if pending.failures == MAX_FAILURES:
                self.reject(
                    command_id, f"the ranks failed {MAX_FAILURES} times while it was pending"
                )
            return

    def run_ended(self) -> None:
        """Rejects the remaining commands."""
        for command_id in list(self._pending):
            self.reject(command_id, "the run ended before it was carried out")
