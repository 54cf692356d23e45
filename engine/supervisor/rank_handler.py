"""Handles the messages of ranks: each one is written to the journal before it is acted on."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

import msgspec

from engine.config.schema import RunConfig
from engine.config.settings import invalid_values
from engine.errors import LinkError
from engine.journal.writer import JournalWriter
from engine.metrics import STEP_TIME
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import Alert, Guardrails
from engine.protocol import rank_messages, sockets
from engine.protocol.commands import BoundaryCommand, Pause, Unpause
from engine.protocol.rank_messages import (
    REWARD_CHANGED,
    Adjusted,
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointKept,
    CheckpointWritten,
    Confirm,
    Ended,
    EvaluationReport,
    Failed,
    FromRank,
    Notice,
    Paused,
    Phase,
    Preempted,
    RankHello,
    Ready,
    Rejected,
    RepeatedChange,
    StepReport,
    Unpaused,
)
from engine.session.states import State
from engine.supervisor.adjustment import record_adjustment
from engine.supervisor.attempt import Attempt
from engine.supervisor.commands.pending_commands import PendingCommands
from engine.supervisor.journal_wait import JournalWait
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.server import receive
from engine.supervisor.state import Parts, SupervisorState
from engine.supervisor.watchdog import Watchdog

log = logging.getLogger("engine")

FAILURE_GRACE = 3.0
"""Seconds that the other ranks have for their own reports after a rank has failed."""


class RankMessageHandler:
    """Serves the connections of the ranks, in every attempt."""

    def __init__(
        self,
        state: SupervisorState,
        config: RunConfig,
        *,
        journal: JournalWriter,
        publisher: EventPublisher,
        pending: PendingCommands,
        ranks: RankProcesses,
        watchdog: Watchdog,
        on_alert: Callable[[Alert], Parts],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Stores the other parts of the supervisor.

        Args:
            state: shared by all parts.
            config: as the run was started.
            journal: written before anything else.
            publisher: publishes states, notices and messages.
            pending: the commands that rank 0 has not carried out yet.
            ranks: the processes.
            watchdog: notified of every message.
            on_alert: called with each alert of a guard rail; returns what is left to do.
            on_error: called with an error of this process; it ends the run.
        """
        self._state = state
        self._journal = journal
        self._publisher = publisher
        self._pending = pending
        self._ranks = ranks
        self._watchdog = watchdog
        self.guardrails = Guardrails(config.guardrails, judges_of(config))
        """Evaluated on every step; replaced by the supervisor when ranks start again."""
        self._best_metric = config.train.best_metric
        self._on_alert = on_alert
        self._on_error = on_error
        self._settings_of_step: tuple[int, dict[str, Any]] = 0, {}
        """The last step that was recorded, and the settings in force in it."""
        self._begun: FromRank | None = None
        """The last message of several parts."""
        self._remaining: Parts = []
        """The parts of that message that are left."""

    async def handle_connection(
        self, hello: RankHello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Handles a rank's messages until it disconnects; refuses ranks of another attempt."""
        rank, attempt = hello.rank, self._state.attempt
        pid = sockets.peer_pid(writer.get_extra_info("socket"))
        # Before the first start there is no token, which an empty one would equal.
        expected = bool(self._ranks.token) and hello.token == self._ranks.token
        if not expected or attempt.is_connected(rank):
            log.warning("refused a rank of another attempt (pid %s)", pid)
            return
        self._ranks.rank_connected(rank, pid)
        self._watchdog.rank_connected(rank)
        attempt.rank_connected(rank, writer)
        if rank == 0:
            self._send_begin()
        try:
            while attempt is self._state.attempt:
                message = rank_messages.decode_from_rank(await receive(reader))
                await self._handle_when_writable(rank, attempt, message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception as error:
            self._on_error(error)
        finally:
            attempt.rank_disconnected(rank)
            if attempt is self._state.attempt:
                self._watchdog.rank_disconnected(rank)

    async def _handle_when_writable(self, rank: int, attempt: Attempt, message: FromRank) -> None:
        """Handles one message; waits while the journal cannot be written.

        That is while its disk has no room, it is locked, or no file can be opened. The rank trains
        on until its reports fill the socket's buffer, and then waits, so no step is lost. Once the
        next attempt has begun, the message is dropped, because it would be recorded under that
        attempt.
        """
        wait = JournalWait(rank, self._state, self._journal, self._publisher)
        while attempt is self._state.attempt:
            self._watchdog.message_received(rank, message)  # waiting is no silence of the rank
            try:
                wait.check_unlocked()
                self.handle(message)
            except (sqlite3.OperationalError, OSError) as error:
                if self._state.stop_now:  # the ranks are dead
                    return
                self._watchdog.extend_silence()  # the other ranks may wait for this one
                if not await wait.after(error):
                    raise
            else:
                wait.end()
                return

    def _send_begin(self) -> None:
        """Sends rank 0 its start and the commands that are still pending."""
        if self._state.pause_recovers:  # new ranks find out whether the reason is gone
            self._end_recovering_pause()
        attempt, journal = self._state.attempt, self._journal
        step = attempt.start.from_step
        attempt.send(
            Begin(
                attempt=journal.attempt,
                from_step=step,
                reseed=journal.reseeded(step),
                average=journal.forked_from_average(step),
                unevaluated=journal.lacks_evaluation(step),
                recorded=journal.recorded_metrics(step),
                checkpoints=journal.checkpoints.steps(),
                kept=journal.checkpoints.kept(),
                kept_aside=dict.fromkeys(attempt.unknown, 0)
                | journal.checkpoints.kept_on_branches(),
                journal=journal.file_id,
                best=journal.checkpoints.values(self._best_metric),
                placed=journal.placed(),
                paused=self._state.paused,
                repeat=[self._without_invalid(c) for c in journal.commands.changes_after(step)],
                undoable=[
                    changes
                    for changes in journal.commands.undoable(step)
                    if not invalid_values({c.key: c.old for c in changes})
                ],
            )
        )
        for message in self._pending.messages():
            attempt.send(message)
        if self._state.in_haste:
            attempt.send(Preempted())

    def _without_invalid(self, repeated: RepeatedChange) -> RepeatedChange:
        """Leaves out values that an earlier version accepted but no rank can work with."""
        problems = invalid_values({c.key: c.new for c in repeated.changes})
        for problem in problems.values():
            text = f"a change of step {repeated.step} is not repeated: {problem}"
            self._publisher.notice("replay", text, self._state.attempt.start.from_step)
        kept = [c for c in repeated.changes if c.key not in problems]
        return msgspec.structs.replace(repeated, changes=kept)

    def handle(self, message: FromRank) -> None:  # noqa: PLR0912 - one short case a message
        """Handles one message; the journal is written first, the observer called last.

        If the journal cannot be written, the same message may be handled again.

        Raises:
            sqlite3.Error: the journal cannot be written.
            LinkError: the rank says hello a second time.
        """
        state, journal = self._state, self._journal
        match message:
            case Phase():
                state.phases[message.rank] = message
                state.timer.phase(message)
            case Ready(info=info, settings=settings):
                journal.record_event("ready", info)
                journal.set_meta(settings=settings)
                state.settings = settings
                state.timer.restart()
                state.began = state.attempt.ready = True
                self._show_state()
            case StepReport():
                self._handle_in_parts(message, partial(self._record_step, message))
            case EvaluationReport():
                self._handle_in_parts(message, partial(self._record_evaluation, message))
            case CheckpointWritten(step=step, size=size, score=score, kl=kl):
                if not journal.is_in_place():  # it was written where another session may be now
                    self._ranks.kill()
                    return
                journal.checkpoints.record(step, size, score, kl)
                state.attempt.send(Confirm(step=step, alerts=self.guardrails.first_alerts()))
            case CheckpointComplete(step=step, removed=removed):
                self._complete_checkpoint(step, removed)
            case CheckpointKept(step=step):
                journal.checkpoints.keep(step)
            case Applied():
                self._handle_in_parts(message, partial(self._applied, message))
            case Rejected(id=command_id, reason=reason):
                self._pending.reject(command_id, reason)
            case Notice():
                self._notice(message)
            case Paused():
                self._handle_in_parts(message, partial(self._paused, message))
            case Unpaused():
                self._handle_in_parts(message, partial(self._unpaused, message))
            case Adjusted():
                record_adjustment(message, state, journal, self._publisher)
            case Failed():
                state.attempt.record_failure(message)
                if self._ranks.count > 1:  # the others wait in a collective operation
                    asyncio.get_running_loop().call_later(
                        FAILURE_GRACE, self._ranks.kill, self._ranks.token
                    )
            case Ended():
                state.attempt.ended = message
            case RankHello():
                raise LinkError("a second hello on one connection")
            case _:
                assert_never(message)
        self._publisher.rank_message(message)

    def _complete_checkpoint(self, step: int, removed: list[int]) -> None:
        needed = sorted(self._state.needed().intersection(removed))
        self._journal.checkpoints.complete(step, [s for s in removed if s not in needed])
        self._state.attempt.send(Confirm(step=step, needed=needed))

    def _handle_in_parts(self, message: FromRank, first: Callable[[], Parts]) -> None:
        """Handles the first part of a message, then the parts that it returns.

        If the journal cannot be written, call this again: it continues with the part that failed.
        """
        if message is not self._begun:
            self._begun, self._remaining = message, [first]
        while self._remaining:
            self._remaining[:1] = self._remaining[0]()

    def _record_step(self, report: StepReport) -> Parts:
        """Records a step; returns one part for each of its alerts."""
        state = self._state
        state.rollout_restarts.clear()
        state.rollout_replaced.clear()
        self._journal.record_step(report)
        if report.reference_mix is not None:
            self._journal.record_event("reference", {"mix": report.reference_mix}, report.step)
        # The wall clock kept running during a pause: use the measured step time.
        state.timer.finish_step(report.metrics[STEP_TIME] if state.paused else None)
        self._watchdog.step_done(report.ranks)
        alerts = self.guardrails.check(
            report.step, dict(report.metrics), state.settings, report.samples
        )
        self._settings_of_step = report.step, state.settings
        state.settings = report.settings
        return [partial(self._on_alert, alert) for alert in alerts]

    def _record_evaluation(self, report: EvaluationReport) -> Parts:
        """Records an evaluation outside a step; returns one part for each of its alerts."""
        self._journal.record_evaluation(report.step, report.metrics, report.samples)
        if not report.step:  # no rule is about the policy before the training
            return []
        step, settings = self._settings_of_step
        if step != report.step:  # a step of an earlier engine
            settings = self._state.settings
        alerts = self.guardrails.check(report.step, report.metrics, settings)
        return [partial(self._on_alert, alert) for alert in alerts]

    def _applied(self, message: Applied) -> Parts:
        """Records the end of a command; what it changes here is the part that follows."""
        return [partial(self._show_effect, message, self._pending.applied(message))]

    def _show_effect(self, message: Applied, command: BoundaryCommand | None) -> Parts:
        state, commands = self._state, self._journal.commands
        state.settings = state.settings | {c.key: c.new for c in message.changes}
        if isinstance(command, Pause | Unpause):
            state.paused = isinstance(command, Pause)
            if not state.paused or state.pause_recovers:
                state.pause_reason = None
            state.pause_recovers = False
            state.timer.restart()
            self._show_state()
        elif message.changes:
            self._journal.set_meta(settings=state.settings)
        self._pending.send_reply(commands.reply(message.id))
        return []

    def _notice(self, notice: Notice) -> None:
        if notice.rule == REWARD_CHANGED:
            self.guardrails.forget_steps()
        self._publisher.notice(notice.rule, notice.text, notice.step)

    def _paused(self, message: Paused) -> Parts:
        """Publishes a pause that the ranks began by themselves; the next part sets the state."""
        self._state.paused, self._state.pause_reason = True, message.reason
        self._state.pause_recovers = message.recovers
        self._state.timer.restart()
        evidence = {"traceback": message.traceback} if message.traceback else {}
        alert = Alert(message.rule, "pause", message.reason, message.step, evidence)
        self._publisher.alert(alert)
        return [self._show_state]

    def _unpaused(self, message: Unpaused) -> Parts:
        """Publishes that the ranks ended such a pause; the next part sets the state."""
        self._publisher.notice(message.rule, message.text, message.step)
        self._end_recovering_pause()
        self._state.timer.restart()
        # A person's pause that is on its way to the ranks begins at the next boundary.
        return [] if self._publisher.state == "pausing" else [self._show_state]

    def _end_recovering_pause(self) -> None:
        state = self._state
        state.paused, state.pause_reason, state.pause_recovers = False, None, False

    def _show_state(self) -> Parts:
        state: State = "paused" if self._state.paused else "running"
        # An accepted stop holds, even if a rank died or paused meanwhile.
        if self._state.stopping:
            self._publisher.set_state("stopping")
        else:
            reason = self._state.pause_reason if self._state.paused else None
            self._publisher.set_state(state, reason or "")
        return []
