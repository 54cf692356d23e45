"""Steering keys and dialogs: every command of the app is sent from here."""

from collections.abc import Callable
from pathlib import Path

from textual.app import App
from textual.binding import Binding, BindingType

from engine.config.settings import LIVE_SETTINGS
from engine.errors import RlhfError
from engine.journal.rows import ProbeResult
from engine.protocol.commands import (
    Checkpoint,
    Command,
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
from rlhf_tui.app.settings_input import OFF, parse_value, settings_after
from rlhf_tui.dialogs.base import Choice, ChoiceDialog, InputDialog
from rlhf_tui.format import value_text
from rlhf_tui.screens.context import Say
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand, PendingEffects
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.state.steering_target import SteeringTarget, settings_in_force
from rlhf_tui.state.time_left import about
from rlhf_tui.widgets.lines import Row

NUDGE = 1.1
BINDINGS: list[BindingType] = [
    Binding("p", "pause", "pause"),
    Binding("p", "unpause", "resume"),
    Binding("b", "beta", "beta"),
    Binding("left_square_bracket", "nudge(-1)", "beta −10 %", show=False),
    Binding("right_square_bracket", "nudge(1)", "beta +10 %", show=False),
    Binding("a", "adaptive", "adaptive"),
    Binding("u", "undo", "undo"),
    Binding("e", "change", "set"),
    Binding("c", "save", "checkpoint"),
    Binding("w", "note", "note"),
    Binding("x", "probe", "probe"),
    Binding("S", "stop", "stop"),
]
"""The keys of the app whose actions call :class:`Steering`."""
ACTIONS = (
    "pause", "unpause", "beta", "nudge", "adaptive", "save", "undo", "change", "stop", "note",
    "probe",
)  # fmt: skip
"""The actions of :data:`BINDINGS`; `--read-only` removes them."""
WITH_OLD_VALUE = ("beta", "nudge", "adaptive", "change")
"""The actions that start from a setting in force, which is not known while a run is starting."""
WHILE_STOPPING = ("stop", "note")
"""The actions that a run takes while it is stopping."""


class Steering:
    """Sends the operator's commands to the selected run, all through one sender."""

    def __init__(
        self,
        app: App[None],
        who: str,
        *,
        target: Callable[[], SteeringTarget | None],
        read_only: bool,
        say: Say,
    ) -> None:
        """Sends nothing yet.

        Args:
            app: takes the replies, and has the dialogs.
            who: the operator.
            target: returns the run that the keys act on; None if no run is selected.
            read_only: nothing may be sent.
            say: shows a notice.
        """
        self._app = app
        self._target = target
        self._read_only = read_only
        self._say = say
        self._sender = CommandSender(who)
        self._effects: dict[Path, PendingEffects] = {}
        """By session folder."""
        self._last_read: dict[Path, SteeringTarget] = {}
        """The newest state of each run, by session folder."""

    # -- keys without a dialog -----------------------------------------------------------------

    def pause(self) -> None:
        """Pauses the run at the next step boundary."""
        if (target := self._selected()) is not None:
            self.command(target, Pause(), "pause")

    def unpause(self) -> None:
        """Resumes the paused run, or takes back a pause that is pending."""
        if (target := self._selected()) is not None:
            self.command(target, Unpause(), "resume")

    def nudge_beta(self, direction: int) -> None:
        """Sets beta a tenth higher (1) or lower (-1)."""
        if (target := self._selected()) is None:
            return
        beta = self._effects_of(target).beta(target.beta)
        if beta is None:
            return
        new = float(f"{beta * NUDGE**direction:.4g}")
        self.command(target, SetBeta(value=new), f"beta {value_text(beta)} → {value_text(new)}")

    def toggle_adaptive(self) -> None:
        """Switches between the adaptive controller and a fixed beta."""
        if (target := self._selected()) is not None:
            self._toggle_adaptive(target)

    def _toggle_adaptive(self, target: SteeringTarget) -> None:
        adaptive = target.settings.get("controller") == "adaptive"
        self.command(
            target,
            SetKLController(controller="fixed" if adaptive else "adaptive"),
            "adaptive → fixed" if adaptive else "fixed → adaptive",
        )

    def undo(self) -> None:
        """Takes back the last change."""
        if (target := self._selected()) is not None:
            self.command(target, Undo(), "undo")

    def checkpoint(self) -> None:
        """Saves a checkpoint at the next step boundary."""
        if (target := self._selected()) is not None:
            self.command(target, Checkpoint(), "checkpoint")

    # -- keys with a dialog --------------------------------------------------------------------

    def choose_setting(self) -> None:
        """Asks for a setting, then for its value."""
        from rlhf_tui.dialogs.picker import Option, PickerDialog  # noqa: PLC0415 - as in probe

        if (target := self._selected()) is None:
            return
        options = [
            Option(key, f"{key:<15}", value_text(target.settings.get(key)), path)
            for key, path in LIVE_SETTINGS.items()
        ]

        def take(key: str | None) -> None:
            if key == "controller":
                self._toggle_adaptive(target)
            elif key:
                self._ask_value(target, key)

        self._app.push_screen(PickerDialog(f"Change a setting of {target.name}", options), take)

    def ask_beta(self) -> None:
        """Asks for beta."""
        if (target := self._selected()) is not None:
            self._ask_value(target, "beta")

    def _ask_value(self, target: SteeringTarget, key: str) -> None:
        settings = settings_in_force(target.settings)
        if settings is None:
            self._say(f"{target.name}: settings unknown", "warning")
            return
        old = target.settings.get(key)

        def check(text: str) -> tuple[bool, str]:
            try:
                value = parse_value(key, text, settings)
            except RlhfError as error:
                return False, str(error)
            return True, f"{value_text(old)} → {value_text(value)}   {when(target)}"

        def send(text: str | None) -> None:
            if text is not None:
                value = parse_value(key, text, settings)
                command: Command = (
                    SetBeta(value=value) if key == "beta" else SetSetting(key=key, value=value)
                )
                self.command(target, command, f"{key} {value_text(old)} → {value_text(value)}")

        hint: list[Row] = [[(f"{LIVE_SETTINGS[key]}, now ", "dim"), (value_text(old), "strong")]]
        if key in OFF:
            hint.append([(f"off: {OFF[key]}", "dim")])
        title = f"Set {key} of {target.name}"
        self._app.push_screen(InputDialog(title, hint, value_text(old), check), send)

    def ask_stop(self) -> None:
        """Asks how to end the run."""
        if (target := self._selected()) is None:
            return
        saved = target.checkpoints
        last = f"the last checkpoint is of step {max(saved)}" if saved else "no checkpoint yet"
        rows: list[Row] = [
            [("The run ends; it can be resumed from its last checkpoint.", "")],
            [(f"Step {target.step} is done, {last}.", "dim")],
        ]
        wait = about(target.boundary_in)
        choices = [
            Choice("s", f"Save, then stop ({wait})" if wait else "Save, then stop", "save"),
            Choice("n", "Stop now, unsaved", "now", danger=True),
            Choice("c", "Cancel", "cancel"),
        ]

        def chosen(result: str | None) -> None:
            if result in ("save", "now"):
                self.command(target, Stop(now=result == "now"), "stop")

        self._app.push_screen(ChoiceDialog(f"Stop {target.name}?", rows, choices), chosen)

    def ask_note(self) -> None:
        """Asks for a note, a line that stays with the run."""
        if (target := self._selected()) is None:
            return
        rows: list[Row] = [[(f"Shown on the charts at step {target.step}.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(target, Note(text=text), "note")

        self._app.push_screen(InputDialog(f"Add a note to {target.name}", rows), send)

    def ask_probe(self) -> None:
        """Asks for a prompt, which the policy and the reference complete."""
        if (target := self._selected()) is None:
            return
        rows: list[Row] = [[("Policy and reference respond to it after the current step.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(target, Probe(text=text), "probe")

        self._app.push_screen(InputDialog(f"Probe {target.name}", rows), send)

    def roll_back(self, target: SteeringTarget, step: int) -> None:
        """Asks, then sends a rollback to the checkpoint of `step`."""

        def send(reseed: bool) -> None:
            self.command(target, Rollback(step=step, reseed=reseed), f"roll back to {step}")

        if self.can_steer(target):
            self.ask_roll_back(target, step, send)

    def ask_roll_back(
        self, target: SteeringTarget, step: int, confirmed: Callable[[bool], None]
    ) -> None:
        """Asks for confirmation; `confirmed` gets whether to sample with a new seed."""
        lost = max(target.step - step, 0)
        rows: list[Row] = [
            [(f"The run returns to step {step} and continues.", "")],
            [(f"{lost} steps are discarded (kept as a ghost).", "dim")],
            *settings_after(target, step),
        ]
        choices = [
            Choice("c", "Cancel", "cancel"),
            Choice("r", "Roll back", "back", danger=True),
            Choice("n", "Roll back, new random seed", "reseed", danger=True),
        ]

        def chosen(result: str | None) -> None:
            if result in ("back", "reseed"):
                confirmed(result == "reseed")

        title = f"Roll back {target.name} to step {step}?"
        self._app.push_screen(ChoiceDialog(title, rows, choices), chosen)

    # -- what can be sent ----------------------------------------------------------------------

    def offered(self, action: str) -> bool | None:
        """Whether an action of :data:`ACTIONS` can be carried out, as Textual wants to know it.

        Returns:
            False: its key is hidden; None: its key is disabled, :meth:`why_disabled` says why.
        """
        if self._read_only:
            return False
        target = self._target()
        live = target is not None and target.live
        if target is not None and _is_too_early_or_late(target, action):
            live = False
        if action in ("pause", "unpause"):
            held = live and target is not None and self._held(target)
            if held != (action == "unpause"):
                return False
        return True if live else None

    def why_disabled(self) -> str:
        """Why the keys do nothing; empty if they act."""
        target = self._target()
        if self._read_only:
            return "read-only: commands are disabled"
        if target is None:
            return "no session is open: press 1 and open one"
        if not target.live:
            return _no_engine(target)
        if target.state == "starting":
            return f"{target.name} is starting: its settings are known once it is loaded"
        return f"{target.name} is stopping" if target.state == "stopping" else ""

    def _held(self, target: SteeringTarget) -> bool:
        effects = self._effects.get(target.session.folder)
        return (effects or PendingEffects()).held(target.state)

    def _selected(self) -> SteeringTarget | None:
        """The run that the keys act on; None, with a notice, if it takes no commands."""
        target = self._target()
        if target is None:
            self._say(self.why_disabled(), "warning")
            return None
        return target if self.can_steer(target) else None

    def can_steer(self, target: SteeringTarget) -> bool:
        """Whether a command would reach an engine; shows a notice if not."""
        if self._read_only:
            self._say(self.why_disabled(), "warning")
        elif not target.session.is_live():
            self._say(_no_engine(target), "warning")
        else:
            return True
        return False

    # -- sending -------------------------------------------------------------------------------

    def command(
        self,
        target: SteeringTarget,
        command: Command,
        text: str,
        post: Callable[[CommandAnswered], object] | None = None,
    ) -> bool:
        """Sends a command after all earlier ones; False, with a notice, if no engine takes it.

        Args:
            target: the run.
            command: what to send.
            text: describes the command in notices.
            post: takes the replies, from another thread; None: the app, which shows them.
        """
        if not self.can_steer(target):
            return False
        self._effects_of(target).sent(command, target.state)
        post = post or self._app.post_message
        self._sender.send(OutgoingCommand(target.session, command, text, post))
        self._app.screen.refresh_bindings()
        return True

    def _effects_of(self, target: SteeringTarget) -> PendingEffects:
        """The effects of the commands that were sent to a run and are not read back yet."""
        return self._effects.setdefault(target.session.folder, PendingEffects())

    def run_read(self, target: SteeringTarget) -> None:
        """Call it when a run was read again: effects of commands may show now."""
        folder = target.session.folder
        self._last_read[folder] = target
        if folder in self._effects:
            self._effects[folder].read(target.state, target.beta)

    def command_answered(self, message: CommandAnswered) -> None:
        """Shows the status of a command."""
        reply, session = message.reply, message.session
        text = f"{session.name}: {message.text}"
        target = self._latest(session.folder)
        if session.folder in self._effects:
            beta = target.beta if target is not None else None
            self._effects[session.folder].replied(message.command, reply, beta)
        if reply is None:
            self._say(f"{text}: {message.problem}", "error")
        elif reply.status == "rejected":
            self._say(f"{text}: rejected: {reply.reason}", "error")
        elif reply.status == "applied":
            at = f" at step {reply.step}" if reply.step is not None else ""
            self._say(f"{text}: applied{at}")
            if reply.result and isinstance(message.command, Probe):
                from rlhf_tui.dialogs.text import ProbeDialog  # noqa: PLC0415 - keeps start-up short

                prompt, result = message.command.text, ProbeResult.of(reply.result)
                self._app.push_screen(ProbeDialog(session.name, prompt, result, reply.step))
        else:
            expected = f", {when(target)}" if target is not None else ""
            self._say(f"{text}: {reply.status}{expected}")

    def _latest(self, folder: Path) -> SteeringTarget | None:
        """A run as known now: the selected one has a fresher time of its step boundary."""
        target = self._target()
        if target is not None and target.session.folder == folder:
            return target
        return self._last_read.get(folder)


def when(target: SteeringTarget) -> str:
    """When a command takes effect."""
    if target.state == "paused":
        return f"applies from step {target.step + 1}"
    wait = about(target.boundary_in)
    return "applies from the next step" + (f", in {wait}" if wait else "")


def _is_too_early_or_late(target: SteeringTarget, action: str) -> bool:
    """Whether a live run takes no such command now, or its old value is not known."""
    if target.state == "starting":
        return action in WITH_OLD_VALUE
    return target.state == "stopping" and action not in WHILE_STOPPING


def _no_engine(target: SteeringTarget) -> str:
    return f"no engine runs '{target.name}'; resume it: rlhf-tui resume {target.name}"
