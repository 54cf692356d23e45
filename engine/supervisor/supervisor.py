"""The supervisor: one live session's engine, an asyncio coroutine that never imports torch.

It holds the session's lock, serves the socket, starts and watches the ranks, and is the only writer
of the journal. The same coroutine runs in the foreground and in the background. What clients ask is
handled by :mod:`engine.supervisor.command_handler`, what ranks say by
:mod:`engine.supervisor.rank_handler`.
"""

import asyncio
import logging
import signal
import sqlite3

from engine import __version__
from engine.config import file as config_file
from engine.errors import SessionError, UserInputError
from engine.journal.writer import JournalWriter
from engine.launch.start import StartOptions, last_checkpoint
from engine.monitoring.telemetry import busy_gpus
from engine.protocol import sockets
from engine.protocol.rank_messages import Phase
from engine.session import registry
from engine.session.folder import Session
from engine.supervisor.attempt import Attempt
from engine.supervisor.command_handler import CommandHandler
from engine.supervisor.publisher import Observer
from engine.supervisor.rank_handler import RankMessageHandler
from engine.supervisor.state import SupervisorState

log = logging.getLogger("engine")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


async def supervise(session: Session, start: StartOptions, observer: Observer | None = None) -> int:
    """Runs a session until its end.

    Args:
        session: nobody else's.
        start: where to, and with what.
        observer: told what happens, in this process.

    Returns:
        The exit code: 0 finished or stopped, 1 failed, 2 the user's input was wrong.

    Raises:
        SessionLockedError: another engine has the session.
        SessionError: its files or its socket cannot be made, or no longer be written.
    """
    lock = session.acquire()
    try:
        journal = JournalWriter(session)
        try:
            return await _serve(session, journal, start, observer)
        finally:
            journal.close()
    except (OSError, sqlite3.Error) as error:
        raise SessionError(
            f"cannot write in {session.folder}: {error}; "
            f"mend this, then: rlhf-tui resume {session.name}"
        ) from error
    finally:
        session.engine_file.unlink(missing_ok=True)
        lock.release()


async def _serve(
    session: Session, journal: JournalWriter, start: StartOptions, observer: Observer | None
) -> int:
    """All attempts, with the socket open and the session among those that live."""
    before = session.config()
    config = config_file.override(before, start.overrides)
    session.write_config(config)
    journal.set_meta(total_steps=config.train.steps)
    journal.commands.reject_unfinished("the engine ended before it was carried out")
    listener, path = sockets.listen(session.folder)
    live = SupervisorState.of(session, config, journal, path, start, observer)
    desk = CommandHandler(live)
    hearing = RankMessageHandler(live, desk.on_alert)
    supervisor = Supervisor(live)
    session.write_engine(str(path), __version__)
    registry.announce(session)
    await live.server.start(listener, desk, hearing.converse)
    watching = asyncio.create_task(live.watchman.run(supervisor.on_silence, desk.on_alert))
    watching.add_done_callback(supervisor.on_watch_end)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, desk.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    try:
        code = await supervisor.run()
        if code == UserInputError.exit_code:  # the next resume must not meet it again
            session.write_config(before)
        return code
    finally:
        watching.cancel()
        live.ranks.kill()
        live.server.close()
        await asyncio.gather(watching, live.herald.finish(), return_exceptions=True)
        path.unlink(missing_ok=True)
        registry.withdraw(session)
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)


class Supervisor:
    """Starts the ranks, waits for their end, and decides whether they are started again."""

    def __init__(self, live: SupervisorState) -> None:
        self._live = live
        self._restarts = 0

    async def run(self) -> int:
        """As many attempts as it takes; the exit code."""
        live, code = self._live, 0
        if live.config.launch.device != "cpu":
            for text in busy_gpus(live.config.launch.gpus):
                live.herald.notice("busy_gpu", f"look here: {text}", live.journal.step)
        while live.next is not None:
            start, live.next = live.next, None
            code = await self.attempt(start)
        live.orders.run_ended()
        return code

    async def attempt(self, start: StartOptions) -> int:
        """One start of the ranks; sets `live.next` where another one follows."""
        live = self._live
        live.attempt = Attempt(start)
        live.journal.begin_attempt(
            start.from_step, fresh=start.fresh, reseed=start.reseed, origin=start.origin
        )
        self._record_given(start)
        live.herald.set_state("starting")
        live.watchman.begin()
        self._await_machines(start.from_step)
        await live.ranks.start()
        if live.stop_now or live.next is not None:  # ordered before there was anything to end
            live.ranks.kill()
        status = await live.ranks.wait()
        await live.attempt.silence()
        if live.next is not None:  # rolled back
            return 0
        return self.conclude(status)

    def _await_machines(self, step: int) -> None:
        """Says what a run on several machines waits for, until its ranks say better."""
        live = self._live
        others, place = live.config.launch.nodes - 1, live.config.launch.rendezvous
        live.phases.clear()
        if others:
            waiting = Phase(rank=0, step=step, name=f"wait for rlhf-tui join {place}")
            live.phases[0] = waiting
            live.server.show(waiting)
            text = f"waiting for {others} more machine(s): there, rlhf-tui join {place}"
            live.herald.notice("machines", text, step)

    def _record_given(self, start: StartOptions) -> None:
        """Settings given with this start are commands like any other, applied at once."""
        journal = self._live.journal
        for change in start.changes:
            command_id = f"start-{journal.attempt}-{change.key}"
            args = {"key": change.key, "value": change.new}
            journal.commands.record(command_id, "set", args, start.who)
            journal.commands.apply(command_id, start.from_step + 1, [change])

    def conclude(self, status: int) -> int:
        """The ranks have ended with this status: how the session stands now; the exit code."""
        live, attempt = self._live, self._live.attempt
        if live.stop_now and attempt.ended is None and not attempt.failed_by_itself:
            live.herald.set_state("stopped", "stopped at once, nothing was saved")
            return 0
        if attempt.ended is not None:
            reason = attempt.ended.reason
            text = "train.max_hours is used up" if reason == "max_hours" else ""
            live.herald.set_state("stopped" if reason == "stopped" else "finished", text)
            return 0
        failure = attempt.cause(status, live.config.launch, live.session.name)
        data = {
            "text": failure.text,
            "traceback": failure.traceback,
            "user_input": failure.user_input,
        }
        live.journal.record_event("error", data)
        limit = live.config.launch.max_restarts
        final = failure.final or failure.user_input or live.stop_now
        if final or self._restarts >= limit:
            live.herald.set_state("failed", failure.text)
            return 2 if failure.user_input and not live.began else 1
        self._restarts += 1
        if attempt.ready:
            live.orders.attempt_failed()
        live.next = StartOptions(from_step=last_checkpoint(live.session))
        log.error("%s; restart %d of %d", failure.text, self._restarts, limit)
        text = f"{failure.text}: restart {self._restarts} of {limit} from step"
        live.herald.notice("restart", f"{text} {live.next.from_step}", live.journal.step)
        return 1

    def on_silence(self, rank: int, seconds: float) -> None:
        """A rank that has not said a word for too long is taken for hung."""
        self._live.fail(f"rank {rank} has been silent for {seconds:.0f} s", rank)

    def on_watch_end(self, task: asyncio.Task[None]) -> None:
        """Training on unwatched would be worse than ending."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._live.give_up(error)
