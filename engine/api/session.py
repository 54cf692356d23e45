"""One run, for scripts and notebooks: read it, wait for it, steer it.

A session object may be used from several threads, and while others watch and steer the same run.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from engine.api.session_reader import SessionReader
from engine.config.type_errors import expected, shown
from engine.errors import CommandRejectedError, SessionError, UserInputError
from engine.examined import examined
from engine.journal.last_reply import last_reply
from engine.journal.notes import add_note
from engine.journal.rows import ProbeResult
from engine.protocol.client import Client
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Note,
    Pause,
    Probe,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    Undo,
    Unpause,
)
from engine.session.access import current_user

T = TypeVar("T")

POLL_INTERVAL = 0.2
"""Seconds between two evaluations of the condition passed to `wait`."""


def default_operator() -> str:
    """The operator's name if a script gives none: `ana in Python`."""
    return f"{current_user()} in Python"


class Session(SessionReader):
    """A run in its folder, live or ended, that can be waited for and steered."""

    def __init__(self, folder: str | Path, *, who: str | None = None) -> None:
        """Opens a session by its folder, such as `sessions/demo`.

        Args:
            folder: the session's folder; it must exist.
            who: the name under which the journal records the commands sent by this object.
                Default, also for an empty name: this user, `in Python`.

        Raises:
            NoSuchSessionError: there is no session in that folder.
            SessionError: this user cannot read the folder.
        """
        super().__init__(folder)
        self.who = who or default_operator()

    # -- waiting ---------------------------------------------------------------------------------

    def wait(self, condition: "Callable[[Session], T]", timeout: float | None = None) -> T:
        """Waits until a condition holds: `run.wait(lambda run: run.metric("objective/kl") > 6)`.

        Args:
            condition: called with this session, several times a second.
            timeout: seconds; None to wait until the run ends.

        Returns:
            What the condition returned.

        Raises:
            TimeoutError: the condition did not hold in time.
            SessionError: the run has ended, and the condition does not hold.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            live = self.is_live  # before the condition, which then sees the last rows
            if value := condition(self):
                return value
            if not live:
                raise SessionError(f"{self._where()}, so the awaited condition can no longer occur")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._where()}; waited for {timeout:g} s")
            time.sleep(POLL_INTERVAL)

    def _where(self) -> str:
        return f"session '{self.name}' is {self.state} at step {self.step}"

    def wait_for_step(self, step: int, timeout: float | None = None) -> int:
        """Waits until a step is completed, and returns the last completed one.

        Raises:
            TimeoutError: the step was not completed in time.
            SessionError: the run ended before that step.
        """

        def completed(run: Session) -> list[int]:
            last = run.step
            return [last] if last >= step else []  # a list, because step 0 alone is false

        (last,) = self.wait(completed, timeout)
        return last

    def wait_for_end(self, timeout: float | None = None) -> str:
        """Waits until the engine has exited, and returns the state: `finished`, `failed` and so on.

        The session can then be resumed, forked or deleted.

        Raises:
            TimeoutError: the engine did not exit in time.
        """
        return self.wait(lambda run: "" if run.is_live else run.state, timeout)

    # -- steering --------------------------------------------------------------------------------

    def send(self, command: AnyCommand, timeout: float | None = None) -> CommandReply:
        """Sends a command and waits until it is applied; the methods below call this one.

        Commands take effect between two steps, so this takes up to a step.

        Args:
            command: one of :mod:`engine.protocol.commands`.
            timeout: seconds to wait; None to wait without limit, 0 to return as soon as the
                engine has accepted it.

        Returns:
            The engine's reply: its status, the first step with the command in effect, and the
            settings that it changed.

        Raises:
            CommandRejectedError: the engine has rejected it; the message has the reason.
            UserInputError: an argument has a wrong type.
            NoSuchSessionError: the session has no live engine on this machine.
            LinkError: the engine does not reply, or is gone.
            SessionError: the session belongs to another user.
            TimeoutError: the command was not applied in time. It stays pending.
        """
        _check_types(command)
        with Client(self.files, self.who) as client:
            reply = client.send(command)
            if timeout != 0 and not reply.final:
                try:
                    reply = last_reply(client, self.files, command, reply.id, timeout)
                except TimeoutError as error:
                    raise TimeoutError(
                        f"'{command.name()}' is not applied within {timeout:g} s; it stays pending"
                    ) from error
        if reply.status == "rejected":
            raise CommandRejectedError(reply.reason)
        return reply

    def pause(self, timeout: float | None = None) -> CommandReply:
        """Pauses the run at the next step boundary. Raises as :meth:`send`."""
        return self.send(Pause(), timeout)

    def unpause(self, timeout: float | None = None) -> CommandReply:
        """Ends a pause. Raises as :meth:`send`."""
        return self.send(Unpause(), timeout)

    def set(self, key: str, value: Any, timeout: float | None = None) -> CommandReply:
        """Changes a setting, by its name or its configuration key: `run.set("epochs", 2)`.

        Raises as :meth:`send`.
        """
        return self.send(SetSetting(key=key, value=value), timeout)

    def set_beta(self, value: float, timeout: float | None = None) -> CommandReply:
        """Sets beta, the KL coefficient; an adaptive controller continues from it.

        Raises as :meth:`send`.
        """
        return self.send(SetBeta(value=value), timeout)

    def set_kl(
        self,
        controller: Literal["fixed", "adaptive"],
        *,
        target: float | None = None,
        horizon: float | None = None,
        timeout: float | None = None,
    ) -> CommandReply:
        """Sets the KL controller; arguments that are None do not change. Raises as :meth:`send`.

        Args:
            controller: `fixed` or `adaptive`.
            target: KL in nats per response.
            horizon: of the controller, in episodes.
            timeout: as for :meth:`send`.
        """
        command = SetKLController(controller=controller, target=target, horizon=horizon)
        return self.send(command, timeout)

    def undo(self, timeout: float | None = None) -> CommandReply:
        """Reverts the last change of settings by an operator. Raises as :meth:`send`."""
        return self.send(Undo(), timeout)

    def checkpoint(self, timeout: float | None = None) -> CommandReply:
        """Saves a checkpoint at the next step boundary, and keeps it. Raises as :meth:`send`."""
        return self.send(Checkpoint(), timeout)

    def rollback(
        self, step: int, *, reseed: bool = False, timeout: float | None = None
    ) -> CommandReply:
        """Returns to the checkpoint of a step; later steps become an abandoned branch.

        Raises as :meth:`send`.

        Args:
            step: of one of :meth:`checkpoints`.
            reseed: whether to sample different responses than before.
            timeout: as for :meth:`send`.
        """
        return self.send(Rollback(step=step, reseed=reseed), timeout)

    def stop(self, *, now: bool = False, timeout: float | None = None) -> CommandReply:
        """Finishes the step, saves a checkpoint and stops; with `now`, stops at once, unsaved.

        Raises as :meth:`send`. The engine has exited after :meth:`wait_for_end`.
        """
        return self.send(Stop(now=now), timeout)

    def probe(self, prompt: str, timeout: float | None = None) -> ProbeResult:
        """Generates responses of policy and reference to a prompt. Raises as :meth:`send`."""
        if timeout == 0:
            raise UserInputError("a probe has its result once it is applied: give a longer timeout")
        return ProbeResult.of(self.send(Probe(text=prompt), timeout).result)

    def note(self, text: str) -> int:
        """Adds a note to the journal; works for a run that has ended, too.

        Returns:
            The last completed step, to which the note is attached.

        Raises:
            CommandRejectedError: the text is empty or too long.
            SessionError: the session belongs to another user, or cannot be written.
            LinkError: the engine does not reply.
        """
        if not self.is_live:
            return add_note(self.files, text, self.who)
        reply = self.send(Note(text=text))
        return (reply.step or 1) - 1  # the reply has the next step


def _check_types(command: AnyCommand) -> None:
    """Checks types here: the engine would close the connection. Raises UserInputError."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=examined(type(command)))
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at `$.")
        wanted = expected(text)
        field = at.rstrip("`")
        given = shown(getattr(command, field, None))
        problem = f"{field} must be {wanted}, not {given}" if wanted else text
        raise UserInputError(f"{command.name()}: {problem}") from error
    except (TypeError, ValueError, OverflowError) as error:  # numpy's numbers; a broken text
        raise UserInputError(f"{command.name()}: {error}") from error
