"""The operator's commands: keys and dialogs, from any screen, to the engine of the open session."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

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
from engine.session.folder import Session
from rlhf_tui.app.following import Follower
from rlhf_tui.dialogs.base import Choice, ChoiceDialog, InputDialog
from rlhf_tui.dialogs.picker import Option, PickerDialog
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand, PendingEffects
from rlhf_tui.state.messages import CommandAnswered, SessionUpdated
from rlhf_tui.state.session_state import value_text
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.steering import settings_of

NUDGE = 1.1
ACTIONS = (
    "pause", "beta", "nudge", "adaptive", "save", "undo", "change", "stop", "note", "probe",
    "roll_back",
)  # fmt: skip
"""What --read-only takes away."""


class Steer(Follower, inherit_bindings=False):
    """The app as far as it steers."""

    STEERING: ClassVar[list[BindingType]] = [
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

    def take_session(self, session: Session) -> None:
        """With another session nothing is on its way."""
        self._ahead = PendingEffects()
        super().take_session(session)

    # -- one key -------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Hold between two steps, or go on."""
        if not self.can_steer():
            return
        if self._ahead.held(self.state.head.state):
            self.command(Unpause(), "go on")
            return
        wait = self.state.boundary_in()
        self.command(Pause(), "pause" + (f" (in ~{wait:.0f}s)" if wait else ""))

    def action_nudge(self, way: int) -> None:
        """Beta a tenth up or down."""
        beta = self._ahead.beta(self.state.setting("beta")) if self.can_steer() else None
        if beta is None:
            return
        new = float(f"{beta * NUDGE**way:.4g}")
        self.command(SetBeta(value=new), f"beta {value_text(beta)} → {value_text(new)}")

    def action_adaptive(self) -> None:
        """Beta to the controller, and back."""
        adaptive = self.state.setting("controller") == "adaptive"
        self.command(
            SetKLController(controller="fixed" if adaptive else "adaptive"),
            "adaptive → fixed" if adaptive else "fixed → adaptive",
        )

    def action_undo(self) -> None:
        """The last change back."""
        self.command(Undo(), "undo")

    def action_save(self) -> None:
        """A checkpoint at the next step boundary."""
        self.command(Checkpoint(), "checkpoint")

    # -- dialogs -------------------------------------------------------------------------------

    def action_beta(self) -> None:
        """Type beta."""
        if self.can_steer():
            self.ask_value("beta")

    def action_change(self) -> None:
        """Choose a setting, then type its value."""
        if not self.can_steer():
            return
        options = [
            Option(key, f"{key:<15}", value_text(self.state.setting(key)), path)
            for key, path in LIVE_SETTINGS.items()
        ]
        self.push_screen(PickerDialog("Set", options), self._changed)

    def _changed(self, key: str | None) -> None:
        if key == "controller":
            self.action_adaptive()
        elif key:
            self.ask_value(key)

    def ask_value(self, key: str) -> None:
        """A dialog for one setting."""
        settings = settings_of(self.state)
        if settings is None:
            return
        old = self.state.setting(key)

        def check(text: str) -> tuple[bool, str]:
            try:
                value = self.parse(key, text, settings)
            except RlhfError as error:
                return False, str(error)
            return True, f"{value_text(old)} → {value_text(value)}   {self.when()}"

        def send(text: str | None) -> None:
            if text is not None:
                value = self.parse(key, text, settings)
                command: Command = (
                    SetBeta(value=value) if key == "beta" else SetSetting(key=key, value=value)
                )
                self.command(command, f"{key} {value_text(old)} → {value_text(value)}")

        hint: list[Row] = [[(f"{LIVE_SETTINGS[key]}, now ", "dim"), (value_text(old), "strong")]]
        if key == "stop_kl":
            hint.append([("off: the passes never end early", "dim")])
        self.push_screen(InputDialog(key, hint, value_text(old), check), send)

    def parse(self, key: str, text: str, settings: Settings) -> Any:
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

    def when(self) -> str:
        """When a command takes effect."""
        wait = self.state.boundary_in()
        if self.state.head.state == "paused":
            return f"in force from step {self.state.head.step + 1}"
        return "in force from the next step" + (f", in ~{wait:.0f}s" if wait else "")

    def action_stop(self) -> None:
        """Asks how to end the run."""
        if not self.can_steer():
            return
        wait = self.state.boundary_in()
        rows: list[Row] = [
            [("The run ends; it can be resumed from its last checkpoint.", "")],
            [(f"Step {self.state.head.step} is done, ", "dim"), (self._last_saved(), "dim")],
        ]
        soon = f" (~{wait:.0f}s)" if wait else ""
        choices = [
            Choice("s", f"Save, then stop{soon}", "save"),
            Choice("n", "Stop now, unsaved", "now", danger=True),
            Choice("c", "Cancel", "cancel"),
        ]

        def answer(result: str | None) -> None:
            if result in ("save", "now"):
                self.command(Stop(now=result == "now"), "stop")

        self.push_screen(ChoiceDialog("Stop the run?", rows, choices), answer)

    def _last_saved(self) -> str:
        steps = [c.step for c in self.state.checkpoints if c.status == "complete"]
        return f"the last checkpoint is of step {max(steps)}" if steps else "no checkpoint yet"

    def action_note(self) -> None:
        """A line that stays with the run."""
        if not self.can_steer():
            return
        rows: list[Row] = [[(f"Stands on the curves at step {self.state.head.step}.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(Note(text=text), "note")

        self.push_screen(InputDialog("Note", rows), send)

    def action_probe(self) -> None:
        """A prompt for the policy and for the reference."""
        if not self.can_steer():
            return
        rows: list[Row] = [[("The policy and the reference answer it after this step.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self.command(Probe(text=text), "probe")

        self.push_screen(InputDialog("Probe", rows), send)

    def roll_back(self, step: int) -> None:
        """Asks, then goes back to a checkpoint."""

        def send(reseed: bool) -> None:
            self.command(Rollback(step=step, reseed=reseed), f"roll back to {step}")

        if self.can_steer():
            self.ask_roll_back(step, send)

    def ask_roll_back(self, step: int, go: Callable[[bool], None]) -> None:
        """Asks whether to go back to a checkpoint; `go` does it, sampling anew if so told."""
        lost = max(self.state.head.step - step, 0)
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
                go(result == "reseed")

        self.push_screen(ChoiceDialog(f"Roll back to step {step}?", rows, choices), answer)

    # -- sending -------------------------------------------------------------------------------

    @functools.cached_property
    def _sender(self) -> CommandSender:
        return CommandSender(self.who, self.post_message)

    def can_steer(self) -> bool:
        """Whether commands reach an engine; says what is missing where not."""
        if self.read_only:
            self.say("read-only: no commands from here", "warning")
        elif self.session is None:
            self.say("open a session first (1)", "warning")
        elif not self.session.is_live():
            self.say(
                f"no engine runs '{self.state.name}'; start one: rlhf-tui resume {self.state.name}",
                "warning",
            )
        else:
            return True
        return False

    def command(self, command: Command, text: str) -> None:
        """Sends a command after all that were given before it; what becomes of it is posted."""
        if not self.can_steer() or self.session is None:
            return
        self._ahead.sent(command, self.state.head.state)
        self._sender.send(OutgoingCommand(self.session, command, text))

    def on_session_updated(self, message: SessionUpdated) -> None:
        """What commands did is there to be read."""
        head = message.news.head
        if head is not None and self.session and message.folder == str(self.session.folder):
            self._ahead.read(head.state, head.settings.get("beta"))

    def on_command_answered(self, message: CommandAnswered) -> None:
        """Says how a command stands."""
        answer, text = message.answer, message.text
        self._ahead.answered(message.command, answer, self.state.setting("beta"))
        if answer is None:
            self.say(f"{text}: {message.problem}", "error")
        elif answer.status == "rejected":
            self.say(f"{text}: rejected: {answer.reason}", "error")
        elif answer.status == "applied":
            at = f" at step {answer.step}" if answer.step is not None else ""
            self.say(f"{text}: applied{at}")
            if answer.result:
                from rlhf_tui.dialogs.text import ProbeDialog  # noqa: PLC0415 - keeps the start quick

                self.push_screen(ProbeDialog(ProbeResult.of(answer.result)))
        else:
            self.say(f"{text}: {answer.status}, {self.when()}")
