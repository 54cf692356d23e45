"""What the ranks of a live session say, and what becomes of it: the journal first."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable

from engine.errors import LinkError
from engine.monitoring.guardrails import Alert
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
from engine.supervisor.server import receive
from engine.supervisor.state import SupervisorState

log = logging.getLogger("engine")

FAILURE_GRACE = 3.0
"""Seconds after a rank failed in which the others may still say something."""


class RankMessageHandler:
    """Listens to the ranks of all attempts."""

    def __init__(self, live: SupervisorState, on_alert: Callable[[Alert], None]) -> None:
        self._live = live
        self._on_alert = on_alert

    async def converse(
        self, hello: RankHello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Takes in what a rank says until it hangs up; one of somebody else's is turned away."""
        live = self._live
        rank, attempt = hello.rank, live.attempt
        if hello.token != live.ranks.token or attempt.is_heard(rank):
            log.warning("turned away a rank that is not ours (pid %s)", hello.pid)
            return
        live.ranks.pids[rank] = hello.pid
        live.watchman.rank_pids = live.ranks.pids
        attempt.opened(rank, writer)
        if rank == 0:
            self._brief()
        try:
            while True:
                message = rank_messages.decode_from_rank(await receive(reader))
                live.watchman.heard(rank)
                self.handle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except sqlite3.Error as error:
            text = f"cannot write the journal: {error}"
            log.error(text)  # noqa: TRY400 - a full disk needs no traceback
            live.fail(text, final=True)
        except Exception as error:
            live.give_up(error)
        finally:
            attempt.closed(rank)
            if attempt is live.attempt:
                live.watchman.gone(rank)

    def _brief(self) -> None:
        """Tells rank 0 where to start, and what was ordered and not yet carried out."""
        live = self._live
        step = live.attempt.start.from_step
        live.attempt.send(
            Begin(
                attempt=live.journal.attempt,
                from_step=step,
                reseed=live.journal.reseeded(step),
                checkpoints=live.journal.timeline(),
                paused=live.paused,
                replay=live.journal.commands.changes_after(step),
                undoable=live.journal.commands.undoable(step),
            )
        )
        for order in live.orders.all():
            live.attempt.send(order)

    def handle(self, message: FromRank) -> None:  # noqa: PLR0912 - one short act a kind
        """One short act for each thing a rank says; the journal first, observers after."""
        live, journal = self._live, self._live.journal
        match message:
            case Phase():
                live.phases[message.rank] = message
                live.server.show(message)
            case Ready(info=info, settings=settings):
                journal.record_event("ready", info)
                journal.set_meta(settings=settings)
                live.settings = settings
                live.pace.restart()
                live.began = live.attempt.ready = True
                self._show_state()
            case StepReport():
                self._take_step(message)
            case CheckpointWritten(step=step, size=size, score=score, kl=kl):
                journal.record_checkpoint(step, size, score, kl)
                live.attempt.send(Confirm(step=step))
            case CheckpointComplete(step=step, removed=removed):
                journal.complete_checkpoint(step, removed)
            case Applied():
                self._applied(message)
            case Rejected(id=command_id, reason=reason):
                live.orders.reject(command_id, reason)
            case Notice(step=step, rule=rule, text=text):
                live.herald.notice(rule, text, step)
            case Failed():
                live.attempt.failed(message)
                if live.ranks.count > 1:  # the others wait for it in a collective
                    asyncio.get_running_loop().call_later(
                        FAILURE_GRACE, live.ranks.kill, live.ranks.token
                    )
            case Ended():
                live.attempt.ended = message
            case RankHello():
                raise LinkError("a second hello on one connection")
        if not isinstance(message, Phase):
            live.server.wake()
        live.herald.pass_on(message)

    def _take_step(self, report: StepReport) -> None:
        live = self._live
        # A paused step's clock stood still for nobody.
        live.pace.step(report.metrics["time/step"] if live.paused else None)
        live.journal.record_step(report)
        live.watchman.times = {t.rank: t for t in report.ranks}
        alerts = live.guardrails.check(
            report.step, dict(report.metrics), live.settings, report.samples
        )
        live.settings = report.settings
        for alert in alerts:
            self._on_alert(alert)

    def _applied(self, message: Applied) -> None:
        live = self._live
        command = live.orders.carried_out(message.id)
        live.journal.commands.apply(message.id, message.step, message.changes, message.result)
        live.settings = live.settings | {c.key: c.new for c in message.changes}
        if isinstance(command, Pause | Unpause):
            live.paused = isinstance(command, Pause)
            live.pace.restart()
            self._show_state()
        elif message.changes:
            live.journal.set_meta(settings=live.settings)
        live.server.tell(live.journal.commands.reply(message.id))

    def _show_state(self) -> None:
        live = self._live
        going: State = "paused" if live.paused else "running"
        # One that is to stop does, though its rank died or paused on the way.
        live.herald.set_state("stopping" if live.stopping else going)
