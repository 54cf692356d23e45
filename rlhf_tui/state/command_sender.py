"""Sends the operator's commands in the order in which they were given, and knows what they will do.

One thread begins them all, one after another: each has its first answer before the next is sent, so
that an undo never overtakes what it shall undo. What becomes of them may take a step, or a day, and
is awaited beside that, by a thread and a connection for each.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import RlhfError
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
from engine.session.folder import Session
from rlhf_tui.state.messages import CommandAnswered

WAIT = 24 * 3600.0
"""Seconds a terminal waits for a command's end; the engine carries it out without it, too."""


@dataclass(frozen=True)
class OutgoingCommand:
    """A command on its way."""

    session: Session
    command: Command
    text: str
    """The same for people."""


class CommandSender:
    """Posts what becomes of each command as :class:`~rlhf_tui.state.messages.Answered`."""

    def __init__(self, who: str, post: Callable[[CommandAnswered], object]) -> None:
        """Starts nothing yet.

        Args:
            who: what the engine calls this operator.
            post: takes the news, from another thread.
        """
        self._who = who
        self._post = post
        self._orders: queue.SimpleQueue[OutgoingCommand] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, order: OutgoingCommand) -> None:
        """Takes a command; returns at once."""
        self._orders.put(order)
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_on, daemon=True, name="commands")
            self._thread.start()

    def _send_on(self) -> None:
        while True:
            self._begin(self._orders.get())

    def _begin(self, order: OutgoingCommand) -> None:
        chosen = new_id()
        try:
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(Client(order.session, self._who))
                answer = client.send(order.command, chosen)
                self._post(CommandAnswered(order.text, order.command, answer))
                if not answer.final:
                    given = (order, client, chosen, stack.pop_all())
                    threading.Thread(
                        target=self._await_end, args=given, daemon=True, name="command"
                    ).start()
        except (RlhfError, OSError) as error:
            self._post(CommandAnswered(order.text, order.command, problem=str(error)))

    def _await_end(
        self, order: OutgoingCommand, client: Client, chosen: str, stack: contextlib.ExitStack
    ) -> None:
        try:
            with stack:
                answer = client.wait(chosen, WAIT)
            self._post(CommandAnswered(order.text, order.command, answer))
        except (RlhfError, OSError) as error:
            self._post(CommandAnswered(order.text, order.command, problem=str(error)))


class PendingEffects:
    """What the last commands will make of a session, until the journal says so.

    A command takes effect at the next step boundary and is read back after that; a key that goes by
    what is shown (pause or go on, a tenth more) would do the same twice when it is pressed twice.
    """

    def __init__(self) -> None:
        self._hold: tuple[Command, str] | None = None
        """Pause or go on, and the state in which it was sent."""
        self._beta: SetBeta | None = None
        self._over: float | None = None
        """The beta that was shown when the command had been carried out; None until then."""

    def sent(self, command: Command, state: str) -> None:
        """A command is on its way; `state`: the session's, as shown."""
        if isinstance(command, Pause | Unpause):
            self._hold = command, state
        elif isinstance(command, SetBeta):
            self._beta, self._over = command, None
        elif isinstance(command, Undo | SetKLController | Rollback):
            self._beta = None

    def answered(self, command: Command, answer: CommandReply | None, beta: float | None) -> None:
        """How a command stands, None: it was not sent; `beta`: the one shown now."""
        if answer is not None and not answer.final:
            return
        applied = answer is not None and answer.status == "applied"
        if command is self._beta:
            self._beta, self._over = (self._beta, beta) if applied else (None, None)
        if self._hold is not None and command is self._hold[0] and not applied:
            self._hold = None

    def read(self, state: str, beta: float | None) -> None:
        """What the journal says now."""
        if self._hold is not None and state != self._hold[1]:
            self._hold = None
        if self._over is not None and beta != self._over:
            self._beta = self._over = None

    def held(self, state: str) -> bool:
        """Whether the run is paused, or will be; `state`: as shown."""
        if self._hold is not None:
            return isinstance(self._hold[0], Pause)
        return state in ("paused", "pausing")

    def beta(self, shown: float | None) -> float | None:
        """Beta as it will be."""
        return shown if self._beta is None else self._beta.value
