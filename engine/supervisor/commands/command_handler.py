"""Handles commands from clients, signals and guard rails."""

import contextlib
import logging
import signal
import sqlite3
from functools import partial

import msgspec

from engine.config.schema import RunConfig
from engine.config.settings import Settings
from engine.errors import CommandRejectedError, RlhfError
from engine.examined import examined
from engine.journal.database import write_problem
from engine.journal.writer import JournalWriter
from engine.launch.start_checkpoints import (
    checkpoint_steps,
    needed_checkpoints,
    timeline_checkpoints,
)
from engine.monitoring.guardrails import Alert
from engine.protocol.client import new_id
from engine.protocol.client_messages import CommandReply, CommandRequest
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    DeleteCheckpoint,
    Moment,
    Note,
    Pause,
    Rollback,
    Stop,
    Unpause,
    check_command,
)
from engine.protocol.rank_messages import Preempted, RankCommand
from engine.session.folder import SessionFolder
from engine.session.states import ENDED_STATES
from engine.supervisor.commands.checkpoint_commands import CheckpointCommands
from engine.supervisor.commands.pending_commands import PendingCommands
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.state import Parts, SupervisorState

log = logging.getLogger("engine")

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of schedulers that are about to end a job."""
ACTIONS: dict[str, AnyCommand] = {
    "checkpoint": Checkpoint(keep=False),
    "pause": Pause(),
    "stop": Stop(),
}
"""`action` of a guard rail → the command it issues; `notify` issues none."""
TAKEN_ID = "its id is that of an earlier, different command: give each command a new id"
ROLLING_BACK = "another roll back has not been carried out yet; try again once it has ended"


class CommandHandler:
    """Checks commands, carries out the supervisor's, and sends the others to rank 0."""

    def __init__(
        self,
        state: SupervisorState,
        session: SessionFolder,
        config: RunConfig,
        *,
        journal: JournalWriter,
        publisher: EventPublisher,
        pending: PendingCommands,
        ranks: RankProcesses,
    ) -> None:
        """Stores the other parts of the supervisor.

        Args:
            state: shared by all parts.
            session: holds the checkpoints that roll backs read.
            config: as the run was started.
            journal: records every command before it is carried out.
            publisher: holds the session's state and publishes its changes.
            pending: gets the commands that rank 0 carries out.
            ranks: the processes.
        """
        self._state = state
        self._session = session
        self._config = config
        self._journal = journal
        self._publisher = publisher
        self._pending = pending
        self._ranks = ranks
        self.checkpoints = CheckpointCommands(
            state, session, journal=journal, publisher=publisher, pending=pending, ranks=ranks
        )

    def handle(self, request: CommandRequest, who: str) -> CommandReply:
        """Records and checks a command, then carries it out or sends it to rank 0.

        A stop, and the deletion of a checkpoint, is carried out even if the journal cannot be
        written, such as on a full disk. Every other command is then rejected, unless it is already
        recorded as accepted.
        """
        try:
            return self._record_and_carry_out(request, who)
        except sqlite3.Error as error:
            reason = f"cannot write the journal: {write_problem(error)}"
            # A full disk needs no traceback.
            log.error("%s from %s: %s", request.command.name(), who, reason)  # noqa: TRY400
            if request.id in self._pending:
                return CommandReply(id=request.id, status="accepted", reason=reason)
            return self._carry_out_unrecorded(request, who, reason)

    def _record_and_carry_out(
        self, request: CommandRequest, who: str, *, again: bool = False
    ) -> CommandReply:
        """Does both; `again`: repeats what failed, for a command that the journal already has."""
        command, commands = request.command, self._journal.commands
        if again and request.id in self._pending:  # only its state was not recorded
            self._show_state_after(command)
            return commands.reply(request.id)
        problem = self._problem(command)
        args = command.arguments()
        new = commands.record(request.id, command.name(), args, who, rejected=problem is not None)
        if not new and not again:
            if not commands.is_recorded_as(request.id, command.name(), args):
                return CommandReply(id=request.id, status="rejected", reason=TAKEN_ID)
            return commands.reply(request.id)
        if problem is not None:
            commands.reject(request.id, problem)
        else:
            commands.accept(request.id)
            self._carry_out(request, who)
        self._publisher.rows_added()
        return commands.reply(request.id)

    def _problem(self, command: AnyCommand) -> str | None:
        """Why a command is rejected; None if it is accepted."""
        try:
            check_command(command, self._moment())
            if isinstance(command, Rollback) and self.checkpoints.rolling_back:
                raise CommandRejectedError(ROLLING_BACK)
        except (RlhfError, OSError) as error:  # the latter of the folder of checkpoints
            return str(error)
        return None

    def _carry_out_unrecorded(self, request: CommandRequest, who: str, reason: str) -> CommandReply:
        command = request.command
        if not isinstance(command, Stop | DeleteCheckpoint):
            return CommandReply(id=request.id, status="rejected", reason=reason)
        try:
            check_command(command, self._moment())
        except (RlhfError, OSError) as error:
            return CommandReply(id=request.id, status="rejected", reason=str(error))
        if isinstance(command, DeleteCheckpoint):
            self.checkpoints.delete_and_record(request.id, command.step, who)
            step = self._journal.step + 1
            return CommandReply(id=request.id, status="applied", step=step, reason=reason)
        if self._is_immediate(command):
            self._end_ranks()
            step = self._journal.step + 1
            return CommandReply(id=request.id, status="applied", step=step, reason=reason)
        # The ranks try to save. If that fails too, the error ends the run.
        self._state.stopping = True
        with contextlib.suppress(sqlite3.Error):
            self._publisher.set_state("stopping")
        stop = RankCommand(id=request.id, command=command)
        self._pending.add(stop, who, recorded=False)
        self._state.attempt.send(stop)
        return CommandReply(id=request.id, status="accepted", reason=reason)

    def _moment(self) -> Moment:
        return Moment(
            state="stopping" if self._state.stop_now else self._publisher.state,
            paused=self._pending.paused_after(self._state.paused),
            recovers=self._state.pause_recovers,
            settings=msgspec.convert(self._state.settings, examined(Settings), strict=False),
            config=self._config,
            checkpoint_steps=partial(timeline_checkpoints, self._session),
            needed_steps=lambda: needed_checkpoints(self._session) | self._state.needed(),
            saved_steps=partial(checkpoint_steps, self._session),
        )

    def _carry_out(self, request: CommandRequest, who: str) -> None:
        """Carries out a supervisor's command; sends any other to rank 0."""
        state = self._state
        match request.command:
            case Stop() if self._is_immediate(request.command):
                # First: if it raises, the command is carried out without a record.
                self._journal.commands.apply(request.id, self._journal.step + 1, [])
                self._end_ranks()
            case Rollback() as rollback:
                self.checkpoints.roll_back(request.id, rollback, who)
            case DeleteCheckpoint(step=step):
                self._journal.delete_checkpoint(step, request.id)
                self.checkpoints.delete(step)
            case Note():
                self._journal.commands.apply(request.id, self._journal.step + 1, [])
            case command:
                state.stopping = state.stopping or isinstance(command, Stop)
                message = RankCommand(id=request.id, command=command)
                self._pending.add(message, who)
                state.attempt.send(message)
                self._show_state_after(command)  # last: the journal may raise

    def _show_state_after(self, command: AnyCommand) -> None:
        """Sets the state in which the session waits for a command. Raises sqlite3.Error."""
        if command.state_when_accepted is not None:
            self._publisher.set_state(command.state_when_accepted)
        elif isinstance(command, Unpause) and self._publisher.state == "pausing":
            ready = self._state.attempt.ready
            self._publisher.set_state("running" if ready else "starting")

    def _is_immediate(self, stop: Stop) -> bool:
        """Whether a stop is immediate: while models load there is nothing to save."""
        return stop.now or self._publisher.state == "starting"

    def _end_ranks(self) -> None:
        self._state.stopping = self._state.stop_now = True
        self._ranks.kill()

    def on_signal(self, number: signal.Signals) -> None:
        """Stops after the current step, with a save; at once on a second SIGINT (ctrl+c).

        A second signal of a scheduler does no more than the first: some send it twice at once. The
        ranks end soon after either, because they do not wait for room to save.
        """
        state = self._state
        again = state.stopping and number == signal.SIGINT
        if again or not state.stopping:
            state.preempted = number in PREEMPTIONS
            self.handle(CommandRequest(id=new_id(), command=Stop(now=again)), number.name)
        if number in PREEMPTIONS:  # after the stop, which is then the reason of the end
            state.in_haste = True
            state.attempt.send(Preempted())

    def on_alert(self, alert: Alert) -> Parts:
        """Publishes an alert; the command of its action is the part that follows.

        Raises:
            sqlite3.Error: the journal cannot be written.
        """
        self._publisher.alert(alert)
        command = ACTIONS.get(alert.action)
        if command is None or self._publisher.state in ("stopping", *ENDED_STATES):
            return []
        return [partial(self._issue, alert, CommandRequest(id=new_id(), command=command))]

    def _issue(self, alert: Alert, request: CommandRequest) -> Parts:
        who = f"guard rail {alert.rule}"
        if isinstance(request.command, Stop):  # needs no journal
            self.handle(request, who)
        else:
            reply = self._record_and_carry_out(request, who, again=True)
            # Rejected if the run is paused already, for another reason.
            if isinstance(request.command, Pause) and reply.status == "accepted":
                self._state.pause_reason = alert.cause
        return []
