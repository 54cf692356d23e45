"""Carries out the commands that read or delete the files of a checkpoint, which take minutes."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from functools import partial

from engine.errors import JournalError
from engine.journal.database import write_problem
from engine.journal.writer import JournalWriter
from engine.launch.delete_checkpoint import record_deletion
from engine.launch.start_checkpoints import timeline_checkpoints
from engine.launch.start_options import StartOptions
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Checkpoint, Rollback
from engine.session.checkpoints import checkpoint_path, find_damage, remove
from engine.session.folder import SessionFolder
from engine.supervisor.commands.pending_commands import PendingCommands
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.state import SupervisorState
from engine.supervisor.threads import in_daemon_thread

log = logging.getLogger("engine")

DELETION_PATIENCE = 60.0
"""Most seconds that a run that has ended waits for the files of deleted checkpoints."""


class CheckpointCommands:
    """Rolls back to checkpoints and deletes them, beside the event loop."""

    def __init__(
        self,
        state: SupervisorState,
        session: SessionFolder,
        *,
        journal: JournalWriter,
        publisher: EventPublisher,
        pending: PendingCommands,
        ranks: RankProcesses,
    ) -> None:
        """Stores other parts of the supervisor; see :class:`CommandHandler`."""
        self._state = state
        self._session = session
        self._journal = journal
        self._publisher = publisher
        self._pending = pending
        self._ranks = ranks
        self._rollbacks: dict[str, asyncio.Task[None]] = {}
        """The roll backs, by id, that read their checkpoint or wait for saves."""
        self._deletions: set[asyncio.Task[None]] = set()
        """The deletions of checkpoints whose files are still being removed."""

    @property
    def rolling_back(self) -> bool:
        """Whether a roll back is accepted and not carried out yet."""
        return bool(self._rollbacks)

    def roll_back(self, command_id: str, command: Rollback, who: str) -> None:
        """Reads the checkpoint, then begins an attempt from it; a damaged one is rejected.

        The run continues meanwhile: a large checkpoint takes minutes to read, and a damaged one
        must not end the run. It also continues until the saves that were asked for before are done:
        of the state that is to be abandoned.
        """
        self._state.rolling_back_to = command.step
        saves = self._pending.ids_of(Checkpoint)
        task = asyncio.create_task(self._roll_back(command_id, command, who, saves))
        self._rollbacks[command_id] = task

    def delete(self, step: int) -> None:
        """Deletes the files of a checkpoint that the journal has as removed."""
        self._start_deletion(step, lambda: None)

    def delete_and_record(self, command_id: str, step: int, who: str) -> None:
        """Deletes the files of a checkpoint to make room for the journal, then records that."""
        self._start_deletion(step, partial(self._record_deletion, command_id, step, who))

    async def finish(self) -> None:
        """Call it when the run has ended, before the journal is closed.

        Rejects the roll backs that are not carried out yet, and waits for the files of
        deleted checkpoints, of which nothing would remove the rest.
        """
        for command_id, task in list(self._rollbacks.items()):
            task.cancel()
            self._journal.commands.reject(command_id, "the run ended before it was carried out")
            self._pending.send_reply(self._journal.commands.reply(command_id))
        await asyncio.gather(*self._rollbacks.values(), return_exceptions=True)
        self._rollbacks.clear()
        if self._deletions:
            await asyncio.wait(self._deletions, timeout=DELETION_PATIENCE)

    async def _roll_back(
        self, command_id: str, command: Rollback, who: str, saves: list[str]
    ) -> None:
        step, commands = command.step, self._journal.commands
        unusable = await self._unusable(step)
        if unusable is None:
            await self._pending.wait_for(saves)
        self._rollbacks.pop(command_id)
        self._state.rolling_back_to = None
        try:
            if problem := self._rollback_problem(step, unusable):
                commands.reject(command_id, problem)
            else:
                commands.apply(command_id, step + 1, [])
                self._state.next = StartOptions(
                    from_step=step, fresh=True, reseed=command.reseed, who=who
                )
                self._ranks.kill()
            self._pending.send_reply(commands.reply(command_id))
        except sqlite3.Error as error:  # the next start rejects it in the journal, too
            reason = f"cannot write the journal: {write_problem(error)}"
            log.error("%s from %s: %s", command.name(), who, reason)  # noqa: TRY400
            self._pending.send_reply(CommandReply(id=command_id, status="rejected", reason=reason))
        self._publisher.rows_added()

    async def _unusable(self, step: int) -> str | None:
        """Why the run cannot roll back to a checkpoint; None if all of its files are intact."""
        folder = checkpoint_path(self._session.checkpoints, step)
        try:
            damage = await in_daemon_thread(partial(find_damage, folder))
        except Exception as error:  # such as no thread can be started; the command must end
            log.exception("the checkpoint of step %d cannot be read", step)
            return f"the checkpoint of step {step} cannot be read: {error}; the run continues"
        if damage is None:
            return None
        return f"the checkpoint of step {step} is damaged: {damage}; the run continues"

    def _rollback_problem(self, step: int, unusable: str | None) -> str | None:
        """Why a roll back whose checkpoint has been read cannot be carried out; None if it can."""
        if self._state.stopping:
            return "the run is stopping: resume it first"
        try:
            steps = timeline_checkpoints(self._session)
        except (JournalError, OSError) as error:
            return str(error)
        if step not in steps:  # removed, or left behind by a restart, while it was read
            return f"step {step} is no longer a checkpoint of this run"
        return unusable

    def _start_deletion(self, step: int, record: Callable[[], None]) -> None:
        task = asyncio.create_task(self._delete_files(step, record))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _delete_files(self, step: int, record: Callable[[], None]) -> None:
        folder = checkpoint_path(self._session.checkpoints, step)
        try:
            await in_daemon_thread(partial(remove, folder))
            record()
        except Exception as error:  # such as no thread can be started
            text = f"the files of the deleted checkpoint of step {step} cannot be removed: {error}"
            self._publisher.notice("checkpoint", text, self._journal.step)

    def _record_deletion(self, command_id: str, step: int, who: str) -> None:
        try:
            record_deletion(self._journal, command_id, step, who)
            self._publisher.rows_added()
        except sqlite3.Error as error:
            log.warning("the deletion of checkpoint %d could not be recorded: %s", step, error)
