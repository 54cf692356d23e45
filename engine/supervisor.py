"""The supervisor: one live session's engine, an asyncio coroutine that never imports torch.

It holds the session's lock, serves the socket, starts and watches the ranks, and is the only writer
of the journal. The same coroutine runs in the foreground and in the background.
"""

import asyncio
import logging
import signal
from typing import Any, Protocol

from engine import __version__, configfile, protocol, sockets
from engine.errors import LinkError
from engine.journal import Journal
from engine.launcher import Ranks, describe_exit
from engine.protocol import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointWritten,
    Confirm,
    Ended,
    Failed,
    FromRank,
    Message,
    Notice,
    Phase,
    RankHello,
    Ready,
    Rejected,
    StepReport,
    StopOrder,
)
from engine.session import Session
from engine.start import Start

log = logging.getLogger("engine")

HELLO_TIMEOUT = 5.0
"""Seconds within which a connection says who it is."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Observer(Protocol):
    """Sees what happens, as it happens. It must not raise."""

    def state(self, state: str, text: str) -> None:
        """The session's state changed; `text` says why, where there is a why."""

    def message(self, message: FromRank) -> None:
        """A rank said something; the journal has it already."""


class Supervisor:
    """Runs one attempt of one session."""

    def __init__(self, session: Session, start: Start, observer: Observer | None = None) -> None:
        self._session = session
        self._start = start
        self._observer = observer
        self._state = ""
        self._link: asyncio.StreamWriter | None = None
        self._failure: Failed | None = None
        self._ended: Ended | None = None
        self._stopping = False

    async def run(self) -> int:
        """From the lock to the end of the ranks.

        Returns:
            The exit code: 0 finished or stopped, 1 failed, 2 the user's input was wrong.

        Raises:
            SessionLockedError: another engine has the session.
            SessionError: its files or its socket cannot be made.
        """
        lock = self._session.acquire()
        try:
            self._journal = Journal(self._session)
            try:
                return await self._attempt()
            finally:
                self._journal.close()
        finally:
            self._session.engine_file.unlink(missing_ok=True)
            lock.release()

    async def _attempt(self) -> int:
        config = configfile.override(self._session.config(), self._start.overrides)
        self._session.write_config(config)
        self._journal.begin_attempt(self._start.from_step, fresh=self._start.fresh)
        self._journal.set_meta(total_steps=config.train.steps, message="")
        self._set_state("starting")
        self._record_changes()
        listener, path = sockets.listen(self._session.folder)
        self._session.write_engine(str(path), __version__)
        self._ranks = Ranks(self._session, path)
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        server = await asyncio.start_unix_server(self._serve, sock=listener)
        try:
            await self._ranks.start()
            status = await self._ranks.wait()
            await self._drain()
        finally:
            self._ranks.kill()
            server.close()
            path.unlink(missing_ok=True)
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
        return self._conclude(status)

    def _record_changes(self) -> None:
        """Settings given with this start are commands like any other, applied at once."""
        step = self._start.from_step + 1
        for change in self._start.changes:
            command_id = f"start-{self._journal.attempt}-{change.key}"
            args = {"key": change.key, "value": change.new}
            self._journal.record_command(command_id, "set", args, self._start.who)
            self._journal.apply_command(command_id, step, [change])

    async def _drain(self) -> None:
        """The ranks are gone; what they said last may still lie in the socket."""
        if self._link is not None:
            await asyncio.wait_for(self._link_done.wait(), timeout=10)

    def _conclude(self, status: int) -> int:
        if self._failure is None and self._ended is None and not self._stopping:
            text = f"rank 0 {describe_exit(status)}; see rlhf-tui logs {self._session.name}"
            self._failed(Failed(rank=0, text=text))
        if self._failure is not None:
            self._set_state("failed", self._failure.text)
            return 2 if self._failure.user_input else 1
        stopped = self._ended is None or self._ended.reason == "stopped"
        self._set_state("stopped" if stopped else "finished", self._why())
        return 0

    def _why(self) -> str:
        if self._ended is None:
            return "stopped at once, without saving"
        return "train.max_hours is used up" if self._ended.reason == "max_hours" else ""

    # -- signals ------------------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        """The first one stops after the step in hand, saved; a second ctrl+c does not wait."""
        if self._stopping and number == signal.SIGINT:
            log.warning("second %s: stopping at once, without saving", number.name)
            self._ranks.kill()
            return
        self.stop()

    def stop(self) -> None:
        """Ends the run at the next step boundary, with a checkpoint."""
        self._stopping = True
        self._set_state("stopping")
        if self._link is not None:
            self._send(StopOrder())

    # -- the socket ---------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sock = writer.get_extra_info("socket")
            hello = await asyncio.wait_for(_receive(reader), HELLO_TIMEOUT)
            if isinstance(hello, RankHello) and hello.token == self._ranks.token:
                self._link, self._link_done = writer, asyncio.Event()
                await self._converse(reader)
            else:
                log.warning("turned away a connection of uid %s", sockets.peer_uid(sock))
        except (LinkError, TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            log.info("a connection ended: %s", error)
        finally:
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader) -> None:
        """Takes in what rank 0 says until it hangs up."""
        self._send(self._begin())
        if self._stopping:
            self._send(StopOrder())
        try:
            while True:
                self._handle(await _receive(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception as error:
            # The journal cannot be written, or a rank speaks nonsense: training on unrecorded
            # would be worse than ending.
            log.exception("cannot go on")
            self._failed(Failed(rank=0, text=f"{type(error).__name__}: {error}"))
            self._ranks.kill()
        finally:
            self._link_done.set()

    def _begin(self) -> Begin:
        """A fresh start finds only its own changes there: begin_attempt put the others aside."""
        return Begin(
            attempt=self._journal.attempt,
            from_step=self._start.from_step,
            reseed=self._start.reseed,
            replay=self._journal.settled_after(self._start.from_step),
        )

    def _send(self, message: Message) -> None:
        if self._link is not None:
            self._link.write(protocol.encode(message))

    def _handle(self, message: FromRank) -> None:  # noqa: PLR0912 - one short act a kind
        """One short act for each thing a rank says; the journal first, observers after."""
        journal = self._journal
        match message:
            case Ready(info=info):
                journal.record_event("ready", info)
                if not self._stopping:
                    self._set_state("running")
            case StepReport():
                journal.record_step(message)
            case CheckpointWritten(step=step, size=size, score=score, kl=kl, removed=removed):
                journal.record_checkpoint(step, size, score, kl)
                journal.remove_checkpoints(removed)
                self._send(Confirm(step=step))
            case CheckpointComplete(step=step):
                journal.complete_checkpoint(step)
            case Applied(id=command_id, step=step, changes=changes):
                journal.apply_command(command_id, step, changes)
            case Rejected(id=command_id, reason=reason):
                journal.reject_command(command_id, reason)
            case Notice(step=step, rule=rule, text=text):
                journal.record_event("alert", {"rule": rule, "text": text}, step)
            case Failed():
                self._failed(message)
            case Ended():
                self._ended = message
            case Phase():
                pass
            case RankHello():
                raise LinkError("a second hello on one connection")
        if self._observer is not None:
            self._observer.message(message)

    def _failed(self, failure: Failed) -> None:
        if self._failure is None:
            self._failure = failure
            data: dict[str, Any] = {"text": failure.text, "traceback": failure.traceback}
            self._journal.record_event("error", data)

    def _set_state(self, state: str, text: str = "") -> None:
        if state == self._state:
            return
        self._state = state
        self._journal.set_meta(state=state, message=text)
        self._journal.record_event("state", {"state": state, "text": text})
        if self._observer is not None:
            self._observer.state(state, text)


async def _receive(reader: asyncio.StreamReader) -> FromRank:
    length = protocol.frame_length(await reader.readexactly(protocol.HEADER.size))
    return protocol.decode_from_rank(await reader.readexactly(length))
