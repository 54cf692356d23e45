"""The supervisor: one live session's engine, an asyncio coroutine that never imports torch.

It holds the session's lock, serves the socket, starts and watches the ranks, and is the only writer
of the journal. The same coroutine runs in the foreground and in the background.
"""

import asyncio
import logging
import os
import signal
import sqlite3

from engine import __version__, configfile, protocol, registry, sockets
from engine.attempt import Attempt, Pace
from engine.client import new_id
from engine.commands import Checkpoint, Pause, Rollback, Stop, Undo, Unpause, name_of
from engine.config import RunConfig
from engine.control import Answer, Request, Status, Wake
from engine.dispatch import check_now
from engine.errors import LinkError, RlhfError, SessionError, UserInputError
from engine.guardrails import Alert, Guardrails
from engine.herald import Herald, Observer
from engine.journal import Journal
from engine.launcher import Ranks
from engine.orders import Orders
from engine.protocol import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointWritten,
    Confirm,
    Ended,
    Failed,
    FromRank,
    Notice,
    Order,
    Phase,
    RankHello,
    Ready,
    Rejected,
    StepReport,
)
from engine.server import Server, receive
from engine.session import ENDED_STATES, Session
from engine.settings import first_settings
from engine.start import Start, last_checkpoint
from engine.telemetry import busy_gpus
from engine.watch import Watchman

log = logging.getLogger("engine")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAST_WORDS = 3.0
"""Seconds after a rank failed in which the others may still say something."""


class Supervisor:
    """Runs one session until its end, over as many attempts as that takes."""

    def __init__(self, session: Session, start: Start, observer: Observer | None = None) -> None:
        self._session = session
        self._next: Start | None = start
        self._observer = observer
        self._paused = False
        self._stopping = False
        self._stop_now = False
        self._began = False  # something was trained, or could have been
        self._restarts = 0
        self._phases: dict[int, Phase] = {}
        self._pace = Pace()
        self._attempt = Attempt(start)

    # -- from the lock to the end ----------------------------------------------------------------

    async def run(self) -> int:
        """Everything.

        Returns:
            The exit code: 0 finished or stopped, 1 failed, 2 the user's input was wrong.

        Raises:
            SessionLockedError: another engine has the session.
            SessionError: its files or its socket cannot be made, or no longer be written.
        """
        lock = self._session.acquire()
        try:
            self._journal = Journal(self._session)
            try:
                return await self._serve()
            finally:
                self._journal.close()
        except (OSError, sqlite3.Error) as error:
            raise SessionError(
                f"cannot write in {self._session.folder}: {error}; "
                f"mend this, then: rlhf-tui resume {self._session.name}"
            ) from error
        finally:
            self._session.engine_file.unlink(missing_ok=True)
            lock.release()

    async def _serve(self) -> int:
        start = self._next or Start()
        before = self._session.config()
        config = configfile.override(before, start.overrides)
        self._session.write_config(config)
        self._prepare(config)
        self._journal.set_meta(total_steps=config.train.steps)
        self._journal.reject_unfinished("the engine ended before it was carried out")
        listener, path = sockets.listen(self._session.folder)
        self._session.write_engine(str(path), __version__)
        registry.announce(self._session)
        self._ranks = Ranks(self._session, path, config.launch)
        await self._server.start(listener)
        self._watchman = Watchman(self._session, self._config, self._journal, self._server)
        if config.launch.device != "cpu":
            for text in busy_gpus(config.launch.gpus):
                self._herald.notice("busy_gpu", f"look here: {text}", self._journal.step)
        watching = asyncio.create_task(self._watchman.run(self._on_silence, self._on_alert))
        watching.add_done_callback(self._on_watch_end)
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        try:
            while self._next is not None:
                start, self._next = self._next, None
                code = await self._try(start)
            self._orders.run_ended()
            if code == UserInputError.exit_code:  # the next resume must not meet it again
                self._session.write_config(before)
            return code
        finally:
            watching.cancel()
            self._ranks.kill()
            self._server.close()
            await asyncio.gather(watching, self._herald.finish(), return_exceptions=True)
            path.unlink(missing_ok=True)
            registry.withdraw(self._session)
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _prepare(self, config: RunConfig) -> None:
        """What all attempts have in common; the journal is open."""
        self._config, self._settings = config, configfile.as_mapping(first_settings(config))
        self._guardrails = Guardrails(config.guardrails)
        self._server = Server(self, self._converse)
        self._orders = Orders(self._journal, self._server)
        self._herald = Herald(
            self._session.name, self._journal, self._server, config.notify.command, self._observer
        )

    async def _try(self, start: Start) -> int:
        """One start of the ranks; sets `_next` where another one follows."""
        self._attempt = Attempt(start)
        self._journal.begin_attempt(
            start.from_step, fresh=start.fresh, reseed=start.reseed, origin=start.origin
        )
        self._record_given(start)
        self._herald.set_state("starting")
        self._watchman.begin()
        self._await_machines(start.from_step)
        await self._ranks.start()
        if self._stop_now or self._next is not None:  # ordered before there was anything to end
            self._ranks.kill()
        status = await self._ranks.wait()
        await self._attempt.silence()
        if self._next is not None:  # rolled back
            return 0
        return self._conclude(status)

    def _await_machines(self, step: int) -> None:
        """Says what a run on several machines waits for, until its ranks say better."""
        others, place = self._config.launch.nodes - 1, self._config.launch.rendezvous
        self._phases.clear()
        if others:
            waiting = Phase(rank=0, step=step, name=f"wait for rlhf-tui join {place}")
            self._phases[0] = waiting
            self._server.show(waiting)
            text = f"waiting for {others} more machine(s): there, rlhf-tui join {place}"
            self._herald.notice("machines", text, step)

    def _record_given(self, start: Start) -> None:
        """Settings given with this start are commands like any other, applied at once."""
        for change in start.changes:
            command_id = f"start-{self._journal.attempt}-{change.key}"
            args = {"key": change.key, "value": change.new}
            self._journal.record_command(command_id, "set", args, start.who)
            self._journal.apply_command(command_id, start.from_step + 1, [change])

    def _conclude(self, status: int) -> int:
        attempt = self._attempt
        if self._stop_now and attempt.ended is None and not attempt.failed_by_itself:
            self._herald.set_state("stopped", "stopped at once, nothing was saved")
            return 0
        if attempt.ended is not None:
            reason = attempt.ended.reason
            text = "train.max_hours is used up" if reason == "max_hours" else ""
            self._herald.set_state("stopped" if reason == "stopped" else "finished", text)
            return 0
        failure = attempt.cause(status, self._config.launch, self._session.name)
        data = {
            "text": failure.text,
            "traceback": failure.traceback,
            "user_input": failure.user_input,
        }
        self._journal.record_event("error", data)
        if (
            failure.final
            or failure.user_input
            or self._stop_now
            or self._restarts >= self._config.launch.max_restarts
        ):
            self._herald.set_state("failed", failure.text)
            return 2 if failure.user_input and not self._began else 1
        self._restarts += 1
        if attempt.ready:
            self._orders.attempt_failed()
        self._next = Start(from_step=last_checkpoint(self._session))
        limit = self._config.launch.max_restarts
        log.error("%s; restart %d of %d", failure.text, self._restarts, limit)
        text = f"{failure.text}: restart {self._restarts} of {limit} from step"
        self._herald.notice("restart", f"{text} {self._next.from_step}", self._journal.step)
        return 1

    # -- orders ----------------------------------------------------------------------------------

    def answer(self, request: Request, who: str) -> Answer:
        """Takes a command in: journalled, checked, and passed on where it needs a rank."""
        command = request.command
        if not self._journal.record_command(
            request.id, name_of(command), configfile.as_mapping(command), who
        ):
            return self._journal.answer(request.id)
        state = "stopping" if self._stop_now else self._herald.state
        batch = self._config.rollout.batch_size
        try:
            check_now(
                command, state, self._settings, self._session, paused=self._paused, batch=batch
            )
        except RlhfError as error:
            self._journal.reject_command(request.id, str(error))
            self._server.wake()
            return self._journal.answer(request.id)
        self._journal.accept_command(request.id)
        self._act(request, who)
        self._server.wake()
        return self._journal.answer(request.id)

    def _act(self, request: Request, who: str) -> None:
        match request.command:
            case Stop(now=now) if now or self._herald.state == "starting":
                self._end_now(request.id)  # while loading there is nothing to save
            case Rollback(step=step, reseed=reseed):
                self._next = Start(from_step=step, fresh=True, reseed=reseed, who=who)
                self._journal.apply_command(request.id, step + 1, [])
                self._ranks.kill()
            case command if name_of(command) == "note":
                self._journal.apply_command(request.id, self._journal.step + 1, [])
            case command:
                if isinstance(command, Stop):
                    self._stopping = True
                    self._herald.set_state("stopping")
                elif isinstance(command, Pause):
                    self._herald.set_state("pausing")
                order = Order(id=request.id, command=command)
                self._orders.add(order, who)
                self._attempt.send(order)

    def _end_now(self, command_id: str) -> None:
        self._stopping = self._stop_now = True
        self._next = None  # nor does a roll back under way begin
        self._journal.apply_command(command_id, self._journal.step + 1, [])
        self._ranks.kill()

    def _on_signal(self, number: signal.Signals) -> None:
        """The first one stops after the step in hand, saved; a second ctrl+c does not wait."""
        again = self._stopping and number == signal.SIGINT
        if again or not self._stopping:
            self.answer(Request(id=new_id(), command=Stop(now=again)), number.name)

    # -- what others ask -------------------------------------------------------------------------

    def is_rank(self, hello: RankHello) -> bool:
        """Whether it knows the token of the ranks that were started last."""
        ours = hello.token == self._ranks.token and not self._attempt.is_heard(hello.rank)
        if ours:
            self._ranks.pids[hello.rank] = hello.pid
            self._watchman.rank_pids = self._ranks.pids
        return ours

    def status(self) -> Status:
        """How things stand."""
        moving = self._herald.state in ("running", "pausing", "stopping")
        return Status(
            state=self._herald.state,
            step=self._journal.step,
            total_steps=self._config.train.steps,
            attempt=self._journal.attempt,
            settings=self._settings,
            phases=list(self._phases.values()),
            step_seconds=self._pace.step_seconds,
            boundary_in=self._pace.left() if moving else None,
            pending=self._orders.pending(),
            telemetry=self._watchman.latest,
            watchers=self._server.watchers,
            pid=os.getpid(),
        )

    def wake(self) -> Wake:
        """How far the journal is."""
        return Wake(
            step=self._journal.step, event=self._journal.last_event, state=self._herald.state
        )

    # -- what the ranks say ------------------------------------------------------------------------

    async def _converse(
        self, hello: RankHello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Takes in what a rank says until it hangs up."""
        rank, attempt = hello.rank, self._attempt
        attempt.opened(rank, writer)
        if rank == 0:
            self._brief()
        try:
            while True:
                message = protocol.decode_from_rank(await receive(reader))
                self._watchman.heard(rank)
                self._handle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except sqlite3.Error as error:
            text = f"cannot write the journal: {error}"
            log.error(text)  # noqa: TRY400 - a full disk needs no traceback
            attempt.failure = Failed(rank=0, text=text, final=True)
            self._ranks.kill()
        except Exception as error:
            self._give_up(error)
        finally:
            attempt.closed(rank)
            if attempt is self._attempt:
                self._watchman.gone(rank)

    def _brief(self) -> None:
        """Tells rank 0 where to start, and what was ordered and not yet carried out."""
        step = self._attempt.start.from_step
        self._attempt.send(
            Begin(
                attempt=self._journal.attempt,
                from_step=step,
                reseed=self._journal.reseeded(step),
                checkpoints=self._journal.timeline(),
                paused=self._paused,
                replay=self._journal.settled_after(step),
                undoable=self._journal.undoable(step),
            )
        )
        for order in self._orders.all():
            self._attempt.send(order)

    def _handle(self, message: FromRank) -> None:  # noqa: PLR0912 - one short act a kind
        """One short act for each thing a rank says; the journal first, observers after."""
        journal = self._journal
        match message:
            case Phase():
                self._phases[message.rank] = message
                self._server.show(message)
            case Ready(info=info, settings=settings):
                journal.record_event("ready", info)
                journal.set_meta(settings=settings)
                self._settings = settings
                self._pace.restart()
                self._began = self._attempt.ready = True
                self._show_state()
            case StepReport():
                self._take_step(message)
            case CheckpointWritten(step=step, size=size, score=score, kl=kl):
                journal.record_checkpoint(step, size, score, kl)
                self._attempt.send(Confirm(step=step))
            case CheckpointComplete(step=step, removed=removed):
                journal.complete_checkpoint(step, removed)
            case Applied():
                self._applied(message)
            case Rejected(id=command_id, reason=reason):
                self._orders.reject(command_id, reason)
            case Notice(step=step, rule=rule, text=text):
                self._herald.notice(rule, text, step)
            case Failed():
                self._attempt.failed(message)
                if self._ranks.count > 1:  # the others wait for it in a collective
                    asyncio.get_running_loop().call_later(
                        LAST_WORDS, self._ranks.kill, self._ranks.token
                    )
            case Ended():
                self._attempt.ended = message
            case RankHello():
                raise LinkError("a second hello on one connection")
        if not isinstance(message, Phase):
            self._server.wake()
        self._herald.pass_on(message)

    def _take_step(self, report: StepReport) -> None:
        # A paused step's clock stood still for nobody.
        self._pace.step(report.metrics["time/step"] if self._paused else None)
        self._journal.record_step(report)
        self._watchman.times = {t.rank: t for t in report.ranks}
        alerts = self._guardrails.check(
            report.step, dict(report.metrics), self._settings, report.samples
        )
        self._settings = report.settings
        for alert in alerts:
            self._on_alert(alert)

    def _applied(self, message: Applied) -> None:
        command = self._orders.carried_out(message.id)
        self._journal.apply_command(message.id, message.step, message.changes, message.result)
        self._settings = self._settings | {c.key: c.new for c in message.changes}
        if isinstance(command, Pause | Unpause):
            self._paused = isinstance(command, Pause)
            self._pace.restart()
            self._show_state()
        elif isinstance(command, Undo) or message.changes:
            self._journal.set_meta(settings=self._settings)
        self._server.tell(self._journal.answer(message.id))

    def _show_state(self) -> None:
        going = "paused" if self._paused else "running"
        # One that is to stop does, though its rank died or paused on the way.
        self._herald.set_state("stopping" if self._stopping else going)

    # -- what deserves attention -------------------------------------------------------------------

    def _on_watch_end(self, task: asyncio.Task[None]) -> None:
        """Training on unwatched would be worse than ending."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """The journal cannot be written, a rank speaks nonsense: something that must not go on."""
        log.error("cannot go on", exc_info=error)
        text = f"{type(error).__name__}: {error}"
        self._attempt.failure = Failed(rank=0, text=text, final=True)
        self._ranks.kill()

    def _on_silence(self, rank: int, seconds: float) -> None:
        """A rank that has not said a word for too long is taken for hung."""
        self._attempt.failure = Failed(
            rank=rank, text=f"rank {rank} has been silent for {seconds:.0f} s"
        )
        self._ranks.kill()

    def _on_alert(self, alert: Alert) -> None:
        self._herald.alert(alert)
        acts = {"checkpoint": Checkpoint(), "pause": Pause(), "stop": Stop()}
        if alert.action in acts and self._herald.state not in ("stopping", *ENDED_STATES):
            request = Request(id=new_id(), command=acts[alert.action])  # type: ignore[arg-type]
            self.answer(request, f"guard rail {alert.rule}")
