"""What the ranks of a live session say, and what becomes of it: the journal first."""

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from engine.errors import LinkError
from engine.journal.writer import JournalWriter
from engine.metrics import STEP_TIME
from engine.monitoring.guardrails import Alert, Guardrails
from engine.protocol import rank_messages
from engine.protocol.commands import Pause, Unpause
from engine.protocol.rank_messages import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointWritten,
    Confirm,
    Ended,
    Failed,
    FromRank,
    Notice,
    Phase,
    RankHello,
    Ready,
    Rejected,
    StepReport,
)
from engine.session.states import State
from engine.supervisor.pending_commands import PendingCommands
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.rank_processes import RankProcesses
from engine.supervisor.server import Server, receive
from engine.supervisor.state import SupervisorState
from engine.supervisor.watchdog import Watchdog

log = logging.getLogger("engine")

FAILURE_GRACE = 3.0
"""Seconds after a rank failed in which the others may still say something."""


class RankMessageHandler:
    """Listens to the ranks of all attempts."""

    def __init__(
        self,
        state: SupervisorState,
        *,
        journal: JournalWriter,
        server: Server,
        publisher: EventPublisher,
        pending: PendingCommands,
        ranks: RankProcesses,
        watchdog: Watchdog,
        guardrails: Guardrails,
        on_alert: Callable[[Alert], None],
        give_up: Callable[[Exception], None],
    ) -> None:
        """Collaborators, and two calls upwards.

        Args:
            state: shared with the other parts.
            journal: everything is written down first.
            server: wakes those who watch.
            publisher: the session's state, notices and observer.
            pending: what rank 0 has still to carry out.
            ranks: the processes.
            watchdog: told of each sign of life.
            guardrails: evaluated on each step.
            on_alert: takes what a guard rail says.
            give_up: ends the attempt for an error in this process.
        """
        self._state = state
        self._journal = journal
        self._server = server
        self._publisher = publisher
        self._pending = pending
        self._ranks = ranks
        self._watchdog = watchdog
        self._guardrails = guardrails
        self._on_alert = on_alert
        self._give_up = give_up

    async def converse(
        self, hello: RankHello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Takes in what a rank says until it hangs up; one of somebody else's is turned away."""
        rank, attempt = hello.rank, self._state.attempt
        if hello.token != self._ranks.token or attempt.is_heard(rank):
            log.warning("turned away a rank that is not ours (pid %s)", hello.pid)
            return
        self._ranks.pids[rank] = hello.pid
        self._watchdog.opened(rank)
        attempt.opened(rank, writer)
        if rank == 0:
            self._brief()
        try:
            while True:
                message = rank_messages.decode_from_rank(await receive(reader))
                self._watchdog.heard(rank, message)
                self.handle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception as error:
            self._give_up(error)
        finally:
            attempt.closed(rank)
            if attempt is self._state.attempt:
                self._watchdog.gone(rank)

    def _brief(self) -> None:
        """Tells rank 0 where to start, and which commands are not yet carried out."""
        attempt, journal = self._state.attempt, self._journal
        step = attempt.start.from_step
        attempt.send(
            Begin(
                attempt=journal.attempt,
                from_step=step,
                reseed=journal.reseeded(step),
                checkpoints=journal.timeline(),
                paused=self._state.paused,
                replay=journal.commands.changes_after(step),
                undoable=journal.commands.undoable(step),
            )
        )
        for message in self._pending.all():
            attempt.send(message)

    def handle(self, message: FromRank) -> None:  # noqa: PLR0912 - one short act a kind
        """One short act for each thing a rank says; the journal first, observers after."""
        state, journal = self._state, self._journal
        match message:
            case Phase():
                state.phases[message.rank] = message
                self._server.show(message)
            case Ready(info=info, settings=settings):
                journal.record_event("ready", info)
                journal.set_meta(settings=settings)
                state.settings = settings
                state.timer.restart()
                state.began = state.attempt.ready = True
                self._show_state()
            case StepReport():
                self._take_step(message)
            case CheckpointWritten(step=step, size=size, score=score, kl=kl):
                journal.record_checkpoint(step, size, score, kl)
                state.attempt.send(Confirm(step=step))
            case CheckpointComplete(step=step, removed=removed):
                journal.complete_checkpoint(step, removed)
            case Applied():
                self._applied(message)
            case Rejected(id=command_id, reason=reason):
                self._pending.reject(command_id, reason)
            case Notice(step=step, rule=rule, text=text):
                self._publisher.notice(rule, text, step)
            case Failed():
                state.attempt.failed(message)
                if self._ranks.count > 1:  # the others wait for it in a collective
                    asyncio.get_running_loop().call_later(
                        FAILURE_GRACE, self._ranks.kill, self._ranks.token
                    )
            case Ended():
                state.attempt.ended = message
            case RankHello():
                raise LinkError("a second hello on one connection")
            case _:
                assert_never(message)
        if not isinstance(message, Phase):
            self._server.wake()
        self._publisher.pass_on(message)

    def _take_step(self, report: StepReport) -> None:
        state = self._state
        # The wall clock kept running during a pause: use the measured step time.
        state.timer.step(report.metrics[STEP_TIME] if state.paused else None)
        self._journal.record_step(report)
        self._watchdog.step_done(report.ranks)
        alerts = self._guardrails.check(
            report.step, dict(report.metrics), state.settings, report.samples
        )
        state.settings = report.settings
        for alert in alerts:
            self._on_alert(alert)

    def _applied(self, message: Applied) -> None:
        state, commands = self._state, self._journal.commands
        command = self._pending.carried_out(message.id)
        commands.apply(message.id, message.step, message.changes, message.result)
        state.settings = state.settings | {c.key: c.new for c in message.changes}
        if isinstance(command, Pause | Unpause):
            state.paused = isinstance(command, Pause)
            state.timer.restart()
            self._show_state()
        elif message.changes:
            self._journal.set_meta(settings=state.settings)
        self._server.tell(commands.reply(message.id))

    def _show_state(self) -> None:
        going: State = "paused" if self._state.paused else "running"
        # One that is to stop does, though its rank died or paused on the way.
        self._publisher.set_state("stopping" if self._state.stopping else going)
