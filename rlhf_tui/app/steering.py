"""What keys and dialogs ask of the engine: every command of the app is sent from here."""

from collections.abc import Callable
from typing import Any

from textual.app import App
from textual.binding import Binding, BindingType

from engine.config.settings import LIVE_SETTINGS, Settings
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
from rlhf_tui.app.following import SessionFollower
from rlhf_tui.dialogs.base import Choice, ChoiceDialog, InputDialog
from rlhf_tui.dialogs.picker import Option, PickerDialog
from rlhf_tui.screens.context import Say
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand, PendingEffects
from rlhf_tui.state.messages import CommandAnswered, SessionUpdated
from rlhf_tui.state.session_state import SessionState, value_text
from rlhf_tui.state.time_left import about
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.steering import settings_of

NUDGE = 1.1
BINDINGS: list[BindingType] = [
    Binding("p", "pause", "pause"),
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
    "pause", "beta", "nudge", "adaptive", "save", "undo", "change", "stop", "note", "probe",
    "roll_back",
)  # fmt: skip
"""What --read-only takes away."""


class Steering:
    """Sends the operator's commands to the engine of the open session, all through one sender."""

    def __init__(
        self, app: App[None], follower: SessionFollower, who: str, *, read_only: bool, say: Say
    ) -> None:
        """Sends nothing yet.

        Args:
            app: takes the replies, and has the dialogs.
            follower: the open session.
            who: the operator.
            read_only: nothing may be sent.
            say: shows a notice.
        """
        self._app = app
        self._follower = follower
        self._read_only = read_only
        self._say = say
        self._sender = CommandSender(who)
        self._effects = PendingEffects()

    @property
    def _state(self) -> SessionState:
        return self._follower.state

    # -- one key -------------------------------------------------------------------------------

    def toggle_pause(self) -> None:
        """Holds the run at the next step boundary, or continues it."""
        if not self.can_steer():
            return
        state = self._state
        if self._effects.held(state.head.state):
            self.command(Unpause(), "go on")
            return
        wait = about(state.boundary_in())
        self.command(Pause(), f"pause (in {wait})" if wait else "pause")

    def nudge_beta(self, direction: int) -> None:
        """Sets beta a tenth higher (1) or lower (-1)."""
        if not self.can_steer():
            return
        beta = self._effects.beta(self._state.setting("beta"))
        if beta is None:
            return
        new = float(f"{beta * NUDGE**direction:.4g}")
        self.command(SetBeta(value=new), f"beta {value_text(beta)} → {value_text(new)}")

    def toggle_adaptive(self) -> None:
        """Switches between the adaptive controller and a fixed beta."""
        adaptive = self._state.setting("controller") == "adaptive"
        self.command(
            SetKLController(controller="fixed" if adaptive else "adaptive"),
            "adaptive → fixed" if adaptive else "fixed → adaptive",
        )

    def undo(self) -> None:
        """Takes back the last change."""
        self.command(Undo(), "undo")

    def checkpoint(self) -> None:
        """Saves a checkpoint at the next step boundary."""
        self.command(Checkpoint(), "checkpoint")

    # -- dialogs -------------------------------------------------------------------------------

    def choose_setting(self) -> None:
        """Asks for a setting, then for its value."""
        if not self.can_steer():
            return
        options = [
            Option(key, f"{key:<15}", value_text(self._state.setting(key)), path)
            for key, path in LIVE_SETTINGS.items()
        ]

        def take(key: str | None) -> None:
            if key == "controller":
                self.toggle_adaptive()
            elif key:
                self.ask_value(key)

        self._app.push_screen(PickerDialog("Set", options), take)

    def ask_beta(self) -> None:
        """Asks for beta."""
        if self.can_steer():
            self.ask_value("beta")

    def ask_value(self, key: str) -> None:
        """Asks for the value of a setting."""
        settings = settings_of(self._state)
        if settings is None:
            return
        old = self._state.setting(key)

        def check(text: str) -> tuple[bool, str]:
            try:
                value = parse_value(key, text, settings)
            except RlhfError as error:
                return False, str(error)
            return True, f"{value_text(old)} → {value_text(value)}   {self.when()}"

        def send(text: str | None) -> None:
            if text is not None:
                value = parse_value(key, text, settings)
                command: Command = (
                    SetBeta(value=value) if key == "beta" else SetSetting(key=key, value=value)
                )
                self.command(command, f"{key} {value_text(old)} → {value_text(value)}")

        hint: list[Row] = [[(f"{LIVE_SETTINGS[key]}, now ", "dim"), (value_text(old), "strong")]]
        if key == "stop_kl":
            hint.append([("off: the passes never end early", "dim")])
        self._app.push_screen(InputDialog(key, hint, value_text(old), check), send)

    def when(self) -> str:
        """When a command takes effect."""
        state = self._state
        if state.head.state == "paused":
            return f"in force from step {state.head.step + 1}"
        wait = about(state.boundary_in())
        return "in force from the next step" + (f", in {wait}" if wait else "")

    def ask_stop(self) -> None:
        """Asks how to end the run."""
        if not self.can_steer():
            return
        wait = about(self._state.boundary_in())
        rows: list[Row] = [
            [("The run ends; it can be resumed from its last checkpoint.", "")],
            [(f"Step {self._state.head.step} is done, ", "dim"), (self._last_saved(), "dim")],
        ]
        soon = f" ({wait})" if wait else ""
        choices = [
            Choice("s", f"Save, then stop{soon}", "save"),
            Choice("n", "Stop now, unsaved", "now", danger=True),
            Choice("c", "Cancel", "cancel"),
        ]

        def answer(result: str | None) -> None:
            if result in ("save", "now"):
                self.command(Stop(now=result == "now"), "stop")

        self._app.push_screen(ChoiceDialog("Stop the run?", rows, choices), answer)

    def _last_saved(self) -> str:
        steps = [c.step for c in self._state.checkpoints if c.status == "complete"]
        return f"the last checkpoint is of step {max(steps)}" if steps else "no checkpoint yet"

    def ask_note(self) -> None:
        """Asks for a note, a line that stays with the run."""
        if not self.can_steer():
            return
        rows: list[Row] = [[(f"Stands on the curves at step {self._state.head.step}.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(Note(text=text), "note")

        self._app.push_screen(InputDialog("Note", rows), send)

    def ask_probe(self) -> None:
        """Asks for a prompt, which the policy and the reference complete."""
        if not self.can_steer():
            return
        rows: list[Row] = [[("The policy and the reference answer it after this step.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(Probe(text=text), "probe")

        self._app.push_screen(InputDialog("Probe", rows), send)

    def roll_back(self, step: int) -> None:
        """Asks, then sends a rollback to the checkpoint of `step`."""

        def send(reseed: bool) -> None:
            self.command(Rollback(step=step, reseed=reseed), f"roll back to {step}")

        if self.can_steer():
            self.ask_roll_back(step, send)

    def ask_roll_back(self, step: int, confirmed: Callable[[bool], None]) -> None:
        """Asks for confirmation; `confirmed` gets whether to sample with a new seed."""
        lost = max(self._state.head.step - step, 0)
        rows: list[Row] = [
            [(f"The run goes back to step {step} and on from there, at once.", "")],
            [(f"{lost} steps leave the curves; they stay in the journal as a ghost.", "dim")],
        ]
        choices = [
            Choice("c", "Cancel", "cancel"),
            Choice("r", "Roll back", "back", danger=True),
            Choice("n", "Roll back, sample anew", "reseed", danger=True),
        ]

        def answer(result: str | None) -> None:
            if result in ("back", "reseed"):
                confirmed(result == "reseed")

        self._app.push_screen(ChoiceDialog(f"Roll back to step {step}?", rows, choices), answer)

    # -- sending -------------------------------------------------------------------------------

    def can_steer(self) -> bool:
        """Whether a command would reach an engine; shows a notice if not."""
        if self._read_only:
            self._say("read-only: no commands from here", "warning")
        elif self._follower.session is None:
            self._say("open a session first (1)", "warning")
        elif not self._follower.session.is_live():
            name = self._state.name
            self._say(f"no engine runs '{name}'; start one: rlhf-tui resume {name}", "warning")
        else:
            return True
        return False

    def command(
        self,
        command: Command,
        text: str,
        post: Callable[[CommandAnswered], object] | None = None,
    ) -> bool:
        """Sends a command after all earlier ones; False, with a notice, if no engine takes it.

        Args:
            command: what to send.
            text: the same for people.
            post: takes the replies, from another thread; None: the app, which shows them.
        """
        session = self._follower.session
        if not self.can_steer() or session is None:
            return False
        self._effects.sent(command, self._state.head.state)
        self._sender.send(OutgoingCommand(session, command, text, post or self._app.post_message))
        return True

    # -- what becomes of commands --------------------------------------------------------------

    def session_opened(self) -> None:
        """Another session is open: no command of the earlier one is pending here."""
        self._effects = PendingEffects()

    def session_updated(self, message: SessionUpdated) -> None:
        """The journal may show effects of commands now. Call it for updates of the open session."""
        head = message.update.head
        if head is not None:
            self._effects.read(head.state, head.settings.get("beta"))

    def command_answered(self, message: CommandAnswered) -> None:
        """Shows how a command stands."""
        reply, text = message.reply, message.text
        self._effects.replied(message.command, reply, self._state.setting("beta"))
        if reply is None:
            self._say(f"{text}: {message.problem}", "error")
        elif reply.status == "rejected":
            self._say(f"{text}: rejected: {reply.reason}", "error")
        elif reply.status == "applied":
            at = f" at step {reply.step}" if reply.step is not None else ""
            self._say(f"{text}: applied{at}")
            if reply.result:
                from rlhf_tui.dialogs.text import ProbeDialog  # noqa: PLC0415 - keeps start-up short

                self._app.push_screen(ProbeDialog(ProbeResult.of(reply.result)))
        else:
            self._say(f"{text}: {reply.status}, {self.when()}")


def parse_value(key: str, text: str, settings: Settings) -> Any:
    """A typed value as the setting would hold it. Raises CommandRejectedError."""
    value: Any = text.strip()
    if key == "stop_kl" and value in ("off", "none", ""):
        value = None
    else:
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                continue
    return SetSetting(key=key, value=value).new_values(settings)[key]
