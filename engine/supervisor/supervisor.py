"""The supervisor of one live session, a coroutine that never imports torch.

It starts and monitors the ranks, and is the only writer of the journal. Commands are handled by
:mod:`engine.supervisor.commands.command_handler`, messages of ranks by
:mod:`engine.supervisor.rank_handler`, their end by :mod:`engine.supervisor.end_handler`;
:mod:`engine.supervisor.serve` runs it.
"""

import asyncio
import logging
import os
import sqlite3
from pathlib import Path

import msgspec

from engine.config.schema import RunConfig
from engine.config.settings import settings_of
from engine.errors import JournalError, SessionError
from engine.journal.logs.command_log import OF_START
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter, is_busy
from engine.launch.environment import (
    leave_deleted_folder,
    ranks_per_node,
    torch_is_built_for_gpus,
)
from engine.launch.secret import needs_secret, secret_of_run
from engine.launch.start_checkpoints import (
    adopted_checkpoint,
    checkpoint_steps,
    missing_checkpoints,
    unknown_checkpoints,
)
from engine.launch.start_options import StartOptions
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import Guardrails
from engine.monitoring.notify import Notifier, missing_variables
from engine.monitoring.recorded_steps import rebuild
from engine.monitoring.telemetry import busy_gpus
from engine.protocol.client_messages import JournalAdvanced, Status
from engine.protocol.rank_messages import WAIT_FOR, Failed, Phase
from engine.session.checkpoints import checkpoint_path, completed_at, mark_incomplete
from engine.session.folder import SessionFolder
from engine.supervisor.attempt import Attempt, description
from engine.supervisor.commands.command_handler import CommandHandler
from engine.supervisor.commands.pending_commands import PendingCommands
from engine.supervisor.end_handler import EndHandler
from engine.supervisor.journal_wait import JournalWait
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.processes.rollout_engines import RolloutEngines
from engine.supervisor.publisher import EventPublisher, Observer
from engine.supervisor.rank_handler import RankMessageHandler
from engine.supervisor.server import Server
from engine.supervisor.state import SupervisorState
from engine.supervisor.watchdog import Watchdog

log = logging.getLogger("engine")

COMPLETION_TIMEOUT = 600.0
"""Most seconds from the row of a checkpoint in the journal to its COMPLETE; usually a fraction."""


class Supervisor:
    """Starts the ranks and waits for their end, in one attempt after another.

    Also tells clients the session's status. The public attributes are its parts and the state that
    they share.
    """

    def __init__(
        self,
        session: SessionFolder,
        config: RunConfig,
        journal: JournalWriter,
        socket: Path,
        start: StartOptions,
        observer: Observer | None = None,
    ) -> None:
        """Creates the parts; nothing is started yet.

        Args:
            session: its lock is held by this process.
            config: the run's configuration.
            journal: opened for writing.
            socket: path of the server's socket, for the ranks.
            start: the first attempt.
            observer: notified of states, alerts and messages, in this process.
        """
        self._session = session
        self._config = config
        self._journal = journal
        self._first = start
        settings = msgspec.structs.asdict(settings_of(config))
        self.state = SupervisorState(settings=settings, attempt=Attempt(start), next=start)
        self.server = Server()
        self._notifier = Notifier(config.notify, root=session.folder.parent)
        self.publisher = EventPublisher(
            session.name, journal, self.server, self._notifier, observer
        )
        self.pending = PendingCommands(journal.commands, self.server)
        secret = secret_of_run(session) if needs_secret(config) else ""
        self.ranks = RankProcesses(session, socket, config.launch, secret)
        self.rollout = RolloutEngines(
            session,
            config,
            self.state,
            secret,
            on_restart=lambda text: self.publisher.notice("rollout", text, journal.step),
            on_failure=self._fail,
        )
        self.watchdog = Watchdog(session, config, journal, self.server, self.ranks)
        self.commands = CommandHandler(
            self.state,
            session,
            config,
            journal=journal,
            publisher=self.publisher,
            pending=self.pending,
            ranks=self.ranks,
        )
        self.rank_messages = RankMessageHandler(
            self.state,
            config,
            journal=journal,
            publisher=self.publisher,
            pending=self.pending,
            ranks=self.ranks,
            watchdog=self.watchdog,
            on_alert=self.commands.on_alert,
            on_error=self.abort,
        )
        self.attempt_end = EndHandler(
            self.state,
            session,
            config,
            journal=journal,
            publisher=self.publisher,
            pending=self.pending,
        )

    def status(self) -> Status:
        """The session's current status."""
        state, current = self.state, self.publisher.state
        moving = current in ("running", "pausing", "stopping")
        return Status(
            state=current,
            step=self._journal.step,
            total_steps=self._config.train.steps,
            attempt=self._journal.attempt,
            settings=state.settings,
            phases=list(state.phases.values()),
            boundary_in=state.timer.remaining() if moving else None,
            telemetry=self.watchdog.latest,
            watchers=self.server.watchers,
            pid=os.getpid(),
            pause_reason=state.pause_reason if current == "paused" else None,
        )

    def journal_position(self) -> JournalAdvanced:
        """The newest rows of the journal."""
        return JournalAdvanced(
            step=self._journal.step, event=self._journal.last_event, state=self.publisher.state
        )

    async def run(self) -> int:
        """Runs attempts until none follows; returns the exit code of the last one."""
        state, code = self.state, 0
        await self._journal_unlocked()
        launch = self._config.launch
        if launch.device != "cpu" and torch_is_built_for_gpus():
            # Rollout engines can have further GPUs.
            first = None if self._config.rollout.uses_vllm else ranks_per_node(launch)
            for text in busy_gpus(launch.gpus, first):
                self.publisher.notice("busy_gpu", text, self._journal.step)
        for text in missing_variables(self._notifier.channels):
            self.publisher.notice("notify", text, self._journal.step)
        while (start := state.next) is not None:
            try:
                code = await self.run_attempt(start)
            except (OSError, SessionError) as error:  # such as of checkpoints that cannot be read
                if start is self._first:  # whoever starts the engine is told
                    raise
                state.next = None
                code = self.attempt_end.not_begun(error)
        await self.commands.checkpoints.finish()
        self.pending.run_ended()
        return code

    async def run_attempt(self, start: StartOptions) -> int:
        """Starts the ranks and waits for their end; sets `state.next` if an attempt follows."""
        state = self.state
        state.attempt = Attempt(start)
        await self._journal_unlocked()
        resumes = start.from_step and not start.fresh
        missing = missing_checkpoints(self._session, start.from_step) if resumes else []
        state.attempt.unknown = unknown_checkpoints(self._session, start.from_step)
        self._journal.begin_attempt(
            start.from_step,
            fresh=start.fresh,
            reseed=start.reseed,
            origin=start.origin,
            adopt=adopted_checkpoint(self._session, start.from_step),
            total_steps=self._config.train.steps,
        )
        log.info(description(start, self._journal.attempt, first=start is self._first))
        if state.next is start:
            state.next = None
        self._finish_removals()
        if missing:
            text = f"the checkpoint of step {missing[-1]} is recorded, but is not on disk: "
            text += f"resuming from the one before, of step {start.from_step}"
            self.publisher.notice("checkpoint", text, start.from_step)
        if state.attempt.unknown and not start.fresh:
            steps = ", ".join(map(str, state.attempt.unknown))
            text = f"the journal lacks the checkpoints of steps {steps}, as if it was restored "
            text += f"from a copy: continuing from step {start.from_step}; they are kept, and to "
            text += f"continue from one, stop, then: {self._session.recorded_command('resume')} "
            self.publisher.notice("checkpoint", f"{text}--from STEP", start.from_step)
        self._record_start_settings(start)
        self.publisher.set_state("starting")
        if state.stop_now:  # no rank has to start; a roll back that was applied holds
            return self.attempt_end.handle(0)
        self.watchdog.ranks_starting()
        self.rank_messages.guardrails = await self._guardrails(start.from_step)
        self._announce_machines(start.from_step)
        leave_deleted_folder(self._session.folder)
        await self.ranks.start(await self.rollout.start())
        if state.stop_now or state.next is not None:  # asked before the process existed
            self.ranks.kill()
        status = await self.ranks.wait()
        await self.rollout.stop()
        await state.attempt.wait_disconnected()
        await self._journal_unlocked()
        if state.next is not None:  # rolled back
            return 0
        return self.attempt_end.handle(status)

    def _finish_removals(self) -> None:
        """Makes checkpoints that a killed process was to remove incomplete, as it would have first.

        The ranks delete incomplete ones before they save. A copy that was put there later stays.
        """
        removed = self._journal.checkpoints.removed()
        for step in sorted(removed.keys() & {*checkpoint_steps(self._session)}):
            folder = checkpoint_path(self._session.checkpoints, step)
            try:
                if completed_at(folder) < removed[step] + COMPLETION_TIMEOUT:
                    mark_incomplete(folder)
            except OSError as error:
                log.warning("the removed checkpoint of step %d is still there: %s", step, error)

    async def _journal_unlocked(self) -> None:
        """Waits while another program keeps the journal locked.

        Not long if the run is being stopped: what is written next then raises the error.
        """
        wait = JournalWait(0, self.state, self._journal, self.publisher)
        while True:
            try:
                self._journal.check_unlocked()
            except sqlite3.OperationalError as error:
                if not is_busy(error) or not await wait.after(error):
                    return
            else:
                wait.end()
                return

    async def _guardrails(self, from_step: int) -> Guardrails:
        """The guard rails in their state after a checkpoint's step, derived from the timeline.

        If its steps cannot be read, the guard rails start afresh: that is no reason to end a run.
        """

        def read() -> Guardrails:
            with JournalReader(self._session) as reader:
                return rebuild(reader, self._config, from_step)

        try:
            return await asyncio.to_thread(read)
        except JournalError as error:
            text = f"guard rails begin without the steps before: {error}"
            self.publisher.notice("guardrails", text, from_step)
            return Guardrails(self._config.guardrails, judges_of(self._config))

    def _announce_machines(self, step: int) -> None:
        """Shows which machines the run waits for, until its ranks report their own phases."""
        launch = self._config.launch
        others, address = launch.nodes - 1, launch.rendezvous
        needed = launch.fewest_nodes - 1
        self.state.phases.clear()
        if others:
            waiting = Phase(rank=0, step=step, name=f"{WAIT_FOR}rlhf-tui join {address}")
            self.state.phases[0] = waiting
            self.publisher.phase(waiting)
            machines = "1 more machine" if others == 1 else f"{others} more machines"
            if needed < others:
                machines += f" ({needed} at least)"
            text = (
                f"waiting for {machines}; run there: rlhf-tui join {address}{self._secret_words()}"
            )
            self.publisher.notice("machines", text, step)
        if joined := self.rollout.joined:
            machines = "1 machine" if joined == 1 else f"{joined} machines"
            command = f"rlhf-tui join {self._config.rollout.rendezvous} --rollout"
            text = f"{machines} must join to generate; run there: {command}{self._secret_words()}"
            self.publisher.notice("machines", text, step)

    def _secret_words(self) -> str:
        """The end of the command by which machines join: how they get the secret."""
        if self._session.secret_file.exists():
            return f" --secret-file {self._session.secret_file}"
        return ", with the same secret in the environment"

    def _record_start_settings(self, start: StartOptions) -> None:
        """Records the settings given with this start as commands that are applied at once."""
        journal = self._journal
        for change in start.changes:
            command_id = f"{OF_START}{journal.attempt}-{change.key}"
            journal.commands.record_change(command_id, start.from_step + 1, change, start.who)

    def on_silence(self, rank: int, seconds: float) -> None:
        """Ends the attempt because a rank counts as hung.

        An earlier failure remains the cause: a rank is also silent while it waits for one that is
        gone.
        """
        attempt = self.state.attempt
        if attempt.failed_by_itself:
            self.ranks.kill()
        elif attempt.lost:
            text = f"rank {attempt.lost[0]} has ended; see {self._session.recorded_command('logs')}"
            self._fail(text, attempt.lost[0])
        else:
            self._fail(f"rank {rank} has been silent for {seconds:.0f} s", rank)

    def on_watchdog_end(self, task: asyncio.Task[None]) -> None:
        """Ends the run if the watchdog failed: it could no longer detect a hung rank."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.abort(error)

    def abort(self, error: BaseException) -> None:
        """Ends the run for an error in this process, such as a journal that cannot be written."""
        if isinstance(error, sqlite3.Error):  # a full disk needs no traceback
            text = f"cannot write the journal: {error}"
            log.error(text)
        else:
            text = f"{type(error).__name__}: {error}"
            log.error("the supervisor failed", exc_info=error)
        self._fail(text, final=True)

    def _fail(self, text: str, rank: int = 0, *, final: bool = False) -> None:
        """Ends the attempt for a reason that no rank reported; if `final`, no attempt follows."""
        self.state.attempt.failure = Failed(rank=rank, text=text, final=final)
        self.ranks.kill()
