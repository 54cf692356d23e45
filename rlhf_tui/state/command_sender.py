"""Sends the operator's commands in order, and predicts their effects.

One thread sends all commands, one after another: each has its first reply before the next is sent,
so that an undo never overtakes the change it reverts. The last reply may take a step or a day, so
each command has a thread and a connection that wait for it.
"""

import contextlib
import queue
import threading
from collections.abc import Callable

from msgspec import Struct

from engine.errors import RlhfError
from engine.journal.last_reply import last_reply
from engine.protocol.client import Client, new_id
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import (
    Command,
    Pause,
    Rollback,
    SetBeta,
    SetKLController,
    Undo,
    Unpause,
)
from engine.session.folder import SessionFolder
from rlhf_tui.state.messages import CommandAnswered

REPLY_TIMEOUT = 24 * 3600.0
"""Seconds a terminal waits for the last reply; the engine carries out the command in any case."""


UNCHANGED_READINGS = 2
"""After this many readings that show the state before a command, others must have undone it. The
first reading may have begun before the command was applied."""


class OutgoingCommand(Struct, frozen=True):
    """A command to be sent."""

    session: SessionFolder
    command: Command
    text: str
    """Describes the command in notices."""
    post: Callable[[CommandAnswered], object]
    """Called from another thread with each reply, or with the reason why there is none."""


class CommandSender:
    """Sends commands one after another; an app has one."""

    def __init__(self, who: str) -> None:
        """Starts nothing yet; `who` is the operator's name in the command log."""
        self._who = who
        self._queue: queue.SimpleQueue[OutgoingCommand] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, outgoing: OutgoingCommand) -> None:
        """Queues a command; returns at once."""
        self._queue.put(outgoing)
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, daemon=True, name="commands")
            self._thread.start()

    def _send_all(self) -> None:
        while True:
            self._send_one(self._queue.get())

    def _send_one(self, outgoing: OutgoingCommand) -> None:
        command_id = new_id()
        try:
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(Client(outgoing.session, self._who))
                reply = client.send(outgoing.command, command_id)
                _post(outgoing, reply)
                if not reply.final:
                    given = (outgoing, client, command_id, stack.pop_all())
                    threading.Thread(
                        target=_await_end, args=given, daemon=True, name="command"
                    ).start()
        except Exception as error:  # nobody else sees it, and the next command is to be sent
            _post(outgoing, problem=_problem(error))


def _await_end(
    outgoing: OutgoingCommand, client: Client, command_id: str, stack: contextlib.ExitStack
) -> None:
    """Waits for the last reply, then closes the connection, which `stack` holds."""
    try:
        with stack:
            reply = last_reply(
                client, outgoing.session, outgoing.command, command_id, REPLY_TIMEOUT
            )
        _post(outgoing, reply)
    except Exception as error:  # nobody else sees it
        _post(outgoing, problem=_problem(error))


def _problem(error: Exception) -> str:
    known = isinstance(error, RlhfError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _post(outgoing: OutgoingCommand, reply: CommandReply | None = None, problem: str = "") -> None:
    answered = CommandAnswered(outgoing.session, outgoing.text, outgoing.command, reply, problem)
    outgoing.post(answered)


class PendingEffects:
    """Predicts a run's state and beta from pending commands, until the journal shows their effect.

    A command takes effect at the next step boundary and is read back after that. Without the
    prediction, a key that depends on the state (pause or resume, beta +10 %) would send the same
    command twice when it is pressed twice.
    """

    def __init__(self) -> None:
        self._pause: tuple[Command, str] | None = None
        """Pause or unpause, and the state in which it was sent."""
        self._unchanged: int | None = None
        """Readings in that state since the command was applied; None until then."""
        self._beta: SetBeta | None = None
        self._replaced: float | None = None
        """Beta as shown when the command was applied; None until then."""

    def sent(self, command: Command, state: str) -> None:
        """Call it when a command is sent; `state`: of the session, as shown."""
        if isinstance(command, Pause | Unpause):
            self._pause, self._unchanged = (command, state), None
        elif isinstance(command, SetBeta):
            self._beta, self._replaced = command, None
        elif isinstance(command, Undo | SetKLController | Rollback):
            self._beta = None

    def replied(self, command: Command, reply: CommandReply | None, beta: float | None) -> None:
        """Call it for a reply, None if the command could not be sent; `beta`: as shown now."""
        if reply is not None and not reply.final:
            return
        applied = reply is not None and reply.status == "applied"
        if command is self._beta:
            self._beta, self._replaced = (self._beta, beta) if applied else (None, None)
        if self._pause is not None and command is self._pause[0]:
            self._pause, self._unchanged = (self._pause, 0) if applied else (None, None)

    def read(self, state: str, beta: float | None) -> None:
        """Call it with the state and beta in force after each reading of the journal."""
        if self._pause is not None and state != self._pause[1]:
            self._pause = None
        elif self._unchanged is not None:
            self._unchanged += 1
            if self._unchanged >= UNCHANGED_READINGS:
                self._pause = None
        if self._replaced is not None and beta != self._replaced:
            self._beta = self._replaced = None

    def paused(self, state: str) -> bool:
        """Whether the run is paused, or will be; `state`: as shown."""
        if self._pause is not None:
            return isinstance(self._pause[0], Pause)
        return state in ("paused", "pausing")

    def beta(self, shown: float | None) -> float | None:
        """The predicted beta; `shown`: the one in force."""
        return shown if self._beta is None else self._beta.value
