"""Sends the app's commands and tracks their outcome."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import App

from engine.errors import SessionError
from engine.journal.rows import ProbeResult
from engine.protocol.commands import Command, Probe
from rlhf_tui import format as fmt
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand, PendingEffects
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.state.steering_target import SteeringTarget
from rlhf_tui.state.time_left import about
from rlhf_tui.state.timeline import applied_text, effect_text, outcome_text

if TYPE_CHECKING:  # imported when a probe is answered
    from rlhf_tui.dialogs.text import ProbeDialog

READ_ONLY = "read-only: commands are disabled"
POLL_INTERVAL = 0.5
"""Seconds between checks whether a dialog is still open."""


class CommandTracker:
    """Sends all commands through one sender; knows their effects before the journal shows them."""

    def __init__(
        self,
        app: App[None],
        context: AppContext,
        target: Callable[[], SteeringTarget | None],
    ) -> None:
        """Sends nothing yet.

        Args:
            app: takes the replies.
            context: the same app, as screens see it.
            target: returns the run that the keys act on; None if no run is selected.
        """
        self._app = app
        self._context = context
        self.target = target
        self._sender = CommandSender(context.who)
        self._effects: dict[Path, PendingEffects] = {}
        """The effects on each run, by session folder."""
        self._last_read: dict[Path, SteeringTarget] = {}
        """The newest state of each run, by session folder."""

    def no_engine(self, target: SteeringTarget) -> str:
        """The notice that a run has no engine, and how to start one."""
        if target.state == "unreadable":
            return f"'{target.name}' cannot be read"
        resume = fmt.command("resume", target.name, root=self._context.root)
        return f"'{target.name}' has no engine; resume it: {resume}"

    def can_send(self, target: SteeringTarget) -> bool:
        """Whether a command would reach an engine; shows a notice if not."""
        if not self._context.steers:
            self._context.say(READ_ONLY, "warning")
            return False
        try:
            live = target.session.is_live()
        except SessionError as error:
            self._context.say(str(error), "error")
            return False
        if not live:
            self._context.say(self.no_engine(target), "warning")
        return live

    def send(
        self,
        target: SteeringTarget,
        command: Command,
        text: str,
        post: Callable[[CommandAnswered], object] | None = None,
    ) -> bool:
        """Sends a command, see :meth:`CommandActions.send`."""
        if not self.can_send(target):
            return False
        self._effects_of(target).sent(command, target.state)
        post = post or self._app.post_message
        self._sender.send(OutgoingCommand(target.session, command, text, post))
        self._app.screen.refresh_bindings()
        return True

    def paused(self, target: SteeringTarget) -> bool:
        """Whether the run is paused once the commands that were sent are carried out."""
        effects = self._effects.get(target.session.folder)
        return (effects or PendingEffects()).paused(target.state)

    def beta(self, target: SteeringTarget) -> float | None:
        """Beta once the commands that were sent are carried out; None if it is not known."""
        return self._effects_of(target).beta(target.beta)

    def _effects_of(self, target: SteeringTarget) -> PendingEffects:
        """The effects of the commands that were sent to a run and are not read back yet."""
        return self._effects.setdefault(target.session.folder, PendingEffects())

    def run_read(self, target: SteeringTarget) -> None:
        """Call this when a run was read again: effects of commands may be visible now."""
        folder = target.session.folder
        self._last_read[folder] = target
        if folder in self._effects:
            self._effects[folder].read(target.state, target.beta)

    def answered(self, message: CommandAnswered) -> None:
        """Shows the status of a command."""
        reply, session = message.reply, message.session
        text = f"{session.name}: {message.text}"
        target = self._latest(session.folder)
        if session.folder in self._effects:
            beta = target.beta if target is not None else None
            self._effects[session.folder].replied(message.command, reply, beta)
        if reply is None:
            self._context.say(f"{text}: {message.problem}", "error")
        elif reply.status == "rejected":
            self._context.say(f"{text}: rejected: {reply.reason}", "error")
        elif reply.status == "applied":
            name = message.command.name()
            if reply.step is not None and (effect := effect_text(name, reply.step)):
                self._context.say(f"{session.name}: {effect}")
                return
            if reply.changes:  # beta may have moved since the command was sent
                what = applied_text(name, reply.changes)
                text = f"{session.name}: {what}"
            self._context.say(f"{text}: {outcome_text(name, reply.step)}")
            if reply.result and isinstance(message.command, Probe):
                from rlhf_tui.dialogs.text import ProbeDialog  # noqa: PLC0415 - keeps start-up short

                prompt, result = message.command.text, ProbeResult.of(reply.result)
                self._show_probe(ProbeDialog(session.name, prompt, result, reply.step))
        else:
            expected = f", {when(target)}" if target is not None else ""
            self._context.say(f"{text}: {reply.status}{expected}")

    def _show_probe(self, dialog: "ProbeDialog") -> None:
        """Shows the responses to a probe once no other dialog is open: somebody may be typing."""
        if isinstance(self._app.screen, SessionScreen):
            self._app.push_screen(dialog)
        else:
            self._app.set_timer(POLL_INTERVAL, lambda: self._show_probe(dialog))

    def _latest(self, folder: Path) -> SteeringTarget | None:
        """The latest state of a run: the selected one has a fresher estimate of its boundary."""
        target = self.target()
        if target is not None and target.session.folder == folder:
            return target
        return self._last_read.get(folder)


def when(target: SteeringTarget) -> str:
    """When a command takes effect."""
    if target.state == "paused":
        return f"applies from step {target.step + 1}"
    wait = about(target.boundary_in)
    return "applies from the next step" + (f", in {wait}" if wait else "")
