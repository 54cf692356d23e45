"""Steering keys and their dialogs."""

from collections.abc import Callable

from textual.app import App
from textual.binding import Binding, BindingType

from engine.config.settings import LIVE_SETTINGS
from engine.errors import RlhfError
from engine.journal.rows import CheckpointRow
from engine.protocol.commands import (
    Checkpoint,
    Command,
    DeleteCheckpoint,
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
from rlhf_tui import format as fmt
from rlhf_tui.app.command_tracker import READ_ONLY, CommandTracker, when
from rlhf_tui.app.forms.settings_input import OFF, parse_value, settings_after
from rlhf_tui.dialogs.base import Choice, ChoiceDialog, InputDialog
from rlhf_tui.format import change, value_text
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.steering_target import NO_SESSION, SteeringTarget, settings_in_force
from rlhf_tui.state.time_left import about
from rlhf_tui.widgets.lines import Row

NUDGE_FACTOR = 1.1
CONTROLLERS = ("fixed", "adaptive")
BINDINGS: list[BindingType] = [
    Binding("p", "steer('pause')", "pause"),
    Binding("p", "steer('unpause')", "unpause"),
    Binding("b", "steer('beta')", "beta"),
    Binding("left_square_bracket", "steer('lower_beta')", "beta −10 %", show=False),
    Binding("right_square_bracket", "steer('raise_beta')", "beta +10 %", show=False),
    Binding("a", "steer('adaptive')", "adaptive"),
    Binding("u", "steer('undo')", "undo"),
    Binding("e", "steer('change')", "set"),
    Binding("c", "steer('save')", "checkpoint"),
    Binding("w", "steer('note')", "note"),
    Binding("x", "steer('probe')", "probe"),
    Binding("S", "steer('stop')", "stop"),
]
"""The keys of the app that call :meth:`Steering.act`; `--read-only` removes them."""
SETTING_ACTIONS = ("beta", "lower_beta", "raise_beta", "adaptive", "change", "undo")
"""The actions that change a setting: while a run is starting, the values in force are unknown."""
ACTIONS_WHILE_STOPPING = ("stop", "note")
"""The actions that a run takes while it is stopping."""


class Steering:
    """Carries out the steering keys on the selected run."""

    def __init__(self, app: App[None], context: AppContext, commands: CommandTracker) -> None:
        """Sends nothing yet.

        Args:
            app: has the dialogs.
            context: the same app, as screens see it.
            commands: sends the commands.
        """
        self._app = app
        self._context = context
        self._commands = commands
        self._actions: dict[str, Callable[[SteeringTarget], object]] = {
            "pause": lambda run: self._commands.send(run, Pause(), "pause"),
            "unpause": lambda run: self._commands.send(run, Unpause(), "unpause"),
            "beta": lambda run: self._ask_value(run, "beta"),
            "lower_beta": lambda run: self._nudge_beta(run, 1 / NUDGE_FACTOR),
            "raise_beta": lambda run: self._nudge_beta(run, NUDGE_FACTOR),
            "adaptive": self._toggle_adaptive,
            "undo": lambda run: self._commands.send(run, Undo(), "undo"),
            "change": self._choose_setting,
            "save": lambda run: self._commands.send(run, Checkpoint(), "checkpoint"),
            "note": self._ask_note,
            "probe": self._ask_probe,
            "stop": self._ask_stop,
        }

    def act(self, action: str) -> None:
        """Carries out the action of a key, or shows why it does nothing."""
        target = self._commands.target()
        if target is None:
            self._context.say(self.why_disabled(), "warning")
        elif self._commands.can_send(target):
            self._actions[action](target)

    # -- keys without a dialog -----------------------------------------------------------------

    def _nudge_beta(self, target: SteeringTarget, factor: float) -> None:
        """Sets beta a tenth higher or lower."""
        beta = self._commands.beta(target)
        if beta is None:
            return
        new = float(f"{beta * factor:.4g}")
        self._commands.send(target, SetBeta(value=new), change("beta", beta, new))

    def _toggle_adaptive(self, target: SteeringTarget) -> None:
        """Switches between the adaptive controller and a fixed beta."""
        adaptive = target.settings.get("controller") == "adaptive"
        self._commands.send(
            target,
            SetKLController(controller="fixed" if adaptive else "adaptive"),
            "adaptive → fixed" if adaptive else "fixed → adaptive",
        )

    def _set_controller(self, target: SteeringTarget, value: str) -> None:
        """Switches the controller unless the typed value is the current one, or none at all."""
        if value not in ("", *CONTROLLERS):
            self._context.say(
                f"controller must be {' or '.join(CONTROLLERS)}, not '{value}'", "warning"
            )
        elif value == target.settings.get("controller"):
            self._context.say(f"the controller is {value} already")
        else:
            self._toggle_adaptive(target)

    # -- keys with a dialog --------------------------------------------------------------------

    def _choose_setting(self, target: SteeringTarget) -> None:
        """Asks for a setting, then for its value."""
        # Imported here to keep start-up short.
        from engine.config.names_elsewhere import KEYS_HERE  # noqa: PLC0415
        from rlhf_tui.dialogs.picker import Option, PickerDialog  # noqa: PLC0415
        from rlhf_tui.widgets.panels.steering import OTHER_SETTINGS  # noqa: PLC0415

        short = dict(OTHER_SETTINGS)
        options = []
        for key, path in LIVE_SETTINGS.items():
            words = [short.get(key, ""), *(name for name, k in KEYS_HERE.items() if k == path)]
            value = value_text(target.settings.get(key))
            options.append(Option(key, f"{key:<15}", value, path, " ".join(words)))

        def take(chosen: str | None) -> None:
            key, _, value = (chosen or "").partition("=")
            if key == "controller":
                self._set_controller(target, value)
            elif key:
                self._ask_value(target, key, value)

        title = f"Change a setting of {target.name}"
        self._app.push_screen(PickerDialog(title, options, assigns=True), take)

    def _ask_value(self, target: SteeringTarget, key: str, typed: str = "") -> None:
        """Asks for the value of a setting; the field begins with `typed`, or the current value."""
        settings = settings_in_force(target.settings)
        if settings is None:
            self._context.say(f"{target.name}: its settings are known once it is loaded", "warning")
            return
        old = target.settings.get(key)

        def check(text: str) -> tuple[bool, str]:
            try:
                value = parse_value(key, text, settings)
            except RlhfError as error:
                return False, str(error)
            if value == old:
                return True, "unchanged"
            return True, f"{value_text(old)} → {value_text(value)}   {when(target)}"

        def send(text: str | None) -> None:
            if text is not None:
                value = parse_value(key, text, settings)
                command: Command = (
                    SetBeta(value=value) if key == "beta" else SetSetting(key=key, value=value)
                )
                self._commands.send(target, command, change(key, old, value))

        hint: list[Row] = [[(f"{LIVE_SETTINGS[key]}, now ", "dim"), (value_text(old), "strong")]]
        if key in OFF:
            hint.append([(f"off: {OFF[key]}", "dim")])
        if key == "beta" and target.settings.get("controller") == "adaptive":
            hint.append(
                [("The adaptive controller changes it from there; a makes it fixed.", "dim")]
            )
        title = f"Set {key} of {target.name}"
        dialog = InputDialog(title, hint, typed or value_text(old), check, verb="set")
        self._app.push_screen(dialog, send)

    def _ask_stop(self, target: SteeringTarget) -> None:
        """Asks how to end the run."""

        def rows(run: SteeringTarget) -> list[Row]:
            saved = run.checkpoints
            last = f"the last checkpoint is of step {max(saved)}" if saved else "no checkpoint yet"
            return [
                [("The run ends; it can be resumed from its last checkpoint.", "")],
                [(f"Step {run.step} is done, {last}.", "dim")],
            ]

        wait = about(target.boundary_in)
        choices = [
            Choice("s", f"Save, then stop ({wait})" if wait else "Save, then stop", "save"),
            Choice("n", "Stop now, unsaved", "now", danger=True),
            Choice("c", "Cancel", "cancel"),
        ]

        def chosen(result: str | None) -> None:
            if result in ("save", "now"):
                self._commands.send(target, Stop(now=result == "now"), "stop")

        self._ask(f"Stop {target.name}?", target, rows, choices, chosen)

    def _ask_note(self, target: SteeringTarget) -> None:
        """Asks for a note, a line that stays with the run."""
        rows: list[Row] = [[(f"Shown on the charts at step {target.step}.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self._commands.send(target, Note(text=text), "note")

        dialog = InputDialog(f"Add a note to {target.name}", rows, verb="add")
        self._app.push_screen(dialog, send)

    def _ask_probe(self, target: SteeringTarget) -> None:
        """Asks for a prompt, which the policy and the reference complete."""
        rows: list[Row] = [[("Policy and reference respond to it after the current step.", "dim")]]

        def send(text: str | None) -> None:
            if text:
                self._commands.send(target, Probe(text=text), "probe")

        title = f"Probe {target.name} with a prompt"
        dialog = InputDialog(title, rows, verb="send", multiline=True)
        self._app.push_screen(dialog, send)

    def roll_back(self, target: SteeringTarget, step: int, resume: Callable[[bool], None]) -> None:
        """Asks, then sends a rollback; see :meth:`SteeringActions.roll_back`."""

        def send(reseed: bool) -> None:
            if target.session.may_be_live():
                self._commands.send(
                    target, Rollback(step=step, reseed=reseed), f"roll back to {step}"
                )
            else:
                resume(reseed)

        if self._commands.can_send(target):
            self.ask_roll_back(target, step, send)

    def ask_roll_back(
        self, target: SteeringTarget, step: int, confirmed: Callable[[bool], None]
    ) -> None:
        """Asks for confirmation; `confirmed` gets whether to sample with a new seed."""

        def rows(run: SteeringTarget) -> list[Row]:
            lost = fmt.plural(max(run.step - step, 0), "step")
            then = "stays paused" if run.state == "paused" else "continues"
            return [
                [(f"The run returns to step {step} and {then}.", "")],
                [(f"This abandons {lost}, which the charts then draw as a ghost.", "dim")],
                *settings_after(run, step),
            ]

        choices = [
            Choice("c", "Cancel", "cancel"),
            Choice("r", "Roll back", "back", danger=True),
            Choice("n", "Roll back, new random seed", "reseed", danger=True),
        ]

        def chosen(result: str | None) -> None:
            if result in ("back", "reseed"):
                confirmed(result == "reseed")

        self._ask(f"Roll back {target.name} to step {step}?", target, rows, choices, chosen)

    def delete_checkpoint(
        self, target: SteeringTarget, checkpoint: CheckpointRow, delete: Callable[[], None]
    ) -> None:
        """Asks, then deletes a checkpoint; see :meth:`SteeringActions.delete_checkpoint`."""
        step = checkpoint.step
        rows: list[Row] = [
            [("The run can then not return to it, and no session can start from it.", "")],
            [(f"It takes {fmt.size(checkpoint.size)}. This cannot be undone.", "dim")],
        ]
        choices = [Choice("c", "Cancel", "cancel"), Choice("d", "Delete", "delete", danger=True)]

        def chosen(result: str | None) -> None:
            if result != "delete":
                return
            if target.session.may_be_live():
                command = DeleteCheckpoint(step=step)
                self._commands.send(target, command, f"delete checkpoint {step}")
            else:
                delete()

        title = f"Delete the checkpoint of step {step} of {target.name}?"
        self._app.push_screen(ChoiceDialog(title, rows, choices), chosen)

    def _ask(
        self,
        title: str,
        target: SteeringTarget,
        rows: Callable[[SteeringTarget], list[Row]],
        choices: list[Choice],
        chosen: Callable[[str | None], None],
    ) -> None:
        """Asks about a run; the text is of the run as it is while the dialog is open."""

        def rows_now() -> list[Row]:
            now = self._commands.target()
            return rows(now if now is not None and now.session == target.session else target)

        self._app.push_screen(ChoiceDialog(title, rows_now, choices), chosen)

    # -- what can be sent ----------------------------------------------------------------------

    def offered(self, action: str) -> bool | None:
        """Whether an action can be carried out, as Textual wants to know it.

        Returns:
            False: its key is hidden; None: its key is disabled, :meth:`why_disabled` says why.
        """
        if not self._context.steers:
            return False
        target = self._commands.target()
        live = target is not None and target.live
        if target is not None and _is_too_early_or_late(target, action):
            live = False
        if action in ("pause", "unpause"):
            paused = live and target is not None and self._commands.paused(target)
            if paused != (action == "unpause"):
                return False
        return True if live else None

    def why_disabled(self) -> str:
        """Why the keys do nothing; empty if they act."""
        target = self._commands.target()
        if not self._context.steers:
            return READ_ONLY
        if target is None:
            return NO_SESSION
        if not target.live:
            return self._commands.no_engine(target)
        if target.state == "starting":
            return f"{target.name} is starting: its settings are known once it is loaded"
        return f"{target.name} is stopping" if target.state == "stopping" else ""


def _is_too_early_or_late(target: SteeringTarget, action: str) -> bool:
    """Whether a live run does not accept such a command now, or the values are unknown."""
    if target.state == "starting":
        return action in SETTING_ACTIONS
    return target.state == "stopping" and action not in ACTIONS_WHILE_STOPPING
