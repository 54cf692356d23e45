"""The commands of an operator to a live engine, one frozen struct each.

A struct declares everything about its command except its execution: the tag in messages, the line
of help, the checks, the settings it changes, and whether charts mark it. Its union determines who
executes it: the supervisor at once (:data:`SupervisorCommand`), or all ranks at the next step
boundary (:data:`BoundaryCommand`).

The journal records the status of a command: `queued → accepted → applied at step S`, or
`rejected: reason`. All commands work during a pause.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import msgspec
from msgspec import Struct

from engine.config.settings import Settings, apply_settings, check_settings, setting_name
from engine.errors import CommandRejectedError
from engine.session.states import ENDED_STATES, State

if TYPE_CHECKING:  # as in engine.config.settings
    from engine.config.schema import RunConfig

MAX_TEXT = 10_000
"""Maximum number of characters in a note or a probe."""


class Moment(Struct, frozen=True):
    """The state of a session when a command arrives."""

    state: State
    paused: bool
    """Whether the run is paused once the accepted commands are carried out."""
    settings: Settings
    """The current ones."""
    config: "RunConfig"
    """As the run was started."""
    checkpoint_steps: Callable[[], list[int]]
    """Returns the steps that a rollback can name. Reads the journal; may raise JournalError."""
    needed_steps: Callable[[], set[int]]
    """Returns the steps of the checkpoints that a resume may continue from."""
    saved_steps: Callable[[], list[int]]
    """Returns the steps of all checkpoints, also of abandoned branches."""
    recovers: bool = False
    """Whether the current pause ends by itself once its reason is gone."""


class Command(Struct, frozen=True, kw_only=True, tag_field="command", forbid_unknown_fields=True):
    """Base class of all commands; declares the attributes and checks of each."""

    summary: ClassVar[str]
    """One line of help for the command line."""
    on_charts: ClassVar[bool]
    """Whether charts mark the step at which the command is applied."""
    while_stopping: ClassVar[bool] = False
    """Whether the command is accepted while the run is stopping."""
    state_when_accepted: ClassVar[State | None] = None
    """State of the session from acceptance to application; None if it does not change."""
    dropped_after_failures: ClassVar[bool] = True
    """Whether the command is rejected if the ranks fail repeatedly while it is pending."""

    @classmethod
    def name(cls) -> str:
        """The command's tag, as in the journal and on the command line: `pause`, `beta`."""
        return str(cls.__struct_config__.tag)

    def arguments(self) -> dict[str, Any]:
        """The arguments as plain values, for the journal."""
        arguments: dict[str, Any] = msgspec.to_builtins(msgspec.structs.asdict(self))
        return arguments

    def check_arguments(self) -> None:
        """Checks the arguments, whatever the session's state. Raises CommandRejectedError."""

    def check(self, moment: Moment) -> None:
        """Checks the command against the session's state. Raises CommandRejectedError."""

    def new_values(self, settings: Settings) -> dict[str, Any]:
        """The settings that the command changes, with their new values, checked.

        Raises:
            CommandRejectedError: an unknown setting, a wrong type or a value out of range.
        """
        del settings
        return {}


class Pause(Command, frozen=True, tag="pause"):
    """Pauses training at the next step boundary."""

    summary: ClassVar[str] = "Pause at the next step boundary."
    on_charts: ClassVar[bool] = True
    state_when_accepted: ClassVar[State | None] = "pausing"
    dropped_after_failures: ClassVar[bool] = False  # a failure must not end a pause

    def check(self, moment: Moment) -> None:
        # A pause that would end by itself becomes one that does not.
        if moment.paused and not (moment.recovers and moment.state == "paused"):
            raise CommandRejectedError("the run is already paused")


class Unpause(Command, frozen=True, tag="unpause"):
    """Ends a pause."""

    summary: ClassVar[str] = "Continue a paused run."
    on_charts: ClassVar[bool] = True

    def check(self, moment: Moment) -> None:
        if not moment.paused:
            raise CommandRejectedError("the run is not paused")


class Stop(Command, frozen=True, tag="stop"):
    """Ends the run: after the current step and a checkpoint, or at once and unsaved with `now`."""

    summary: ClassVar[str] = "Finish the current step, save a checkpoint and stop."
    on_charts: ClassVar[bool] = True
    while_stopping: ClassVar[bool] = True
    state_when_accepted: ClassVar[State | None] = "stopping"
    dropped_after_failures: ClassVar[bool] = False  # as for a pause

    now: bool = False

    def check(self, moment: Moment) -> None:
        if moment.state == "stopping" and not self.now:
            raise CommandRejectedError("the run is already stopping")


class Checkpoint(Command, frozen=True, tag="checkpoint"):
    """Saves a checkpoint at the next step boundary."""

    summary: ClassVar[str] = "Save a checkpoint at the next step boundary, and keep it."
    on_charts: ClassVar[bool] = False  # charts mark the event of the checkpoint

    keep: bool = True
    """Whether it stays until somebody deletes it, and `train.keep_last` does not count it."""


class DeleteCheckpoint(Command, frozen=True, tag="delete-checkpoint"):
    """Deletes a checkpoint, such as one that an operator saved."""

    summary: ClassVar[str] = "Delete the checkpoint of STEP."
    on_charts: ClassVar[bool] = False
    while_stopping: ClassVar[bool] = True

    step: int

    def check(self, moment: Moment) -> None:
        check_deletable(self.step, moment.needed_steps(), moment.saved_steps())


class SettingCommand(Command, frozen=True):
    """Base class of the commands that change settings."""

    on_charts: ClassVar[bool] = True

    def check(self, moment: Moment) -> None:
        self.checked_values(moment.settings, moment.config)

    def checked_values(self, settings: Settings, config: "RunConfig") -> dict[str, Any]:
        """Like :meth:`new_values`, also checked against the rules between keys.

        Args:
            settings: the current ones.
            config: the other keys of the run.

        Raises:
            CommandRejectedError: as :meth:`new_values`, or keys would contradict each other.
        """
        from engine.config.rules.run_config import check_change  # noqa: PLC0415 - not in the app

        values = self.new_values(settings)
        check_change(apply_settings(config, settings), values)
        return values


class SetBeta(SettingCommand, frozen=True, tag="beta"):
    """Sets the KL coefficient; an adaptive controller continues from it."""

    summary: ClassVar[str] = "Set beta, the KL coefficient."

    value: float

    def new_values(self, settings: Settings) -> dict[str, Any]:
        return check_settings(settings, {"beta": self.value})


class SetKLController(SettingCommand, frozen=True, tag="kl"):
    """Sets the KL controller and its parameters; parameters that are None do not change."""

    summary: ClassVar[str] = "Choose the KL controller, adaptive or fixed."

    controller: Literal["fixed", "adaptive"]
    target: float | None = None
    horizon: float | None = None
    beta_min: float | None = None
    beta_max: float | None = None

    def new_values(self, settings: Settings) -> dict[str, Any]:
        given = msgspec.structs.asdict(self)
        return check_settings(settings, {k: v for k, v in given.items() if v is not None})


class SetSetting(SettingCommand, frozen=True, tag="set"):
    """Changes one setting, given its name or its configuration key."""

    summary: ClassVar[str] = "Change settings, such as learning_rate=1e-5."

    key: str
    value: Any

    def new_values(self, settings: Settings) -> dict[str, Any]:
        return check_settings(settings, {setting_name(self.key): self.value})


class Undo(Command, frozen=True, tag="undo"):
    """Reverts the last change of settings by an operator."""

    summary: ClassVar[str] = "Undo the last change of a setting."
    on_charts: ClassVar[bool] = True


class Rollback(Command, frozen=True, tag="rollback"):
    """Starts a new attempt of the session from an earlier checkpoint."""

    summary: ClassVar[str] = "Return to the checkpoint of STEP and continue from there."
    on_charts: ClassVar[bool] = True

    step: int
    reseed: bool = False

    def check(self, moment: Moment) -> None:
        steps = moment.checkpoint_steps()
        if self.step not in steps:
            available = ", ".join(map(str, steps)) if steps else "none yet"
            raise CommandRejectedError(
                f"there is no checkpoint of step {self.step} (there are: {available})"
            )


class Probe(Command, frozen=True, tag="probe"):
    """Generates responses of the current policy and of the reference to a prompt."""

    summary: ClassVar[str] = "Generate a response to TEXT with policy and reference."
    on_charts: ClassVar[bool] = False

    text: str

    def check_arguments(self) -> None:
        _check_text(self.text)


class Note(Command, frozen=True, tag="note"):
    """Adds a note to the journal."""

    summary: ClassVar[str] = "Add a note to the session's journal."
    on_charts: ClassVar[bool] = False  # charts mark the event of the note
    while_stopping: ClassVar[bool] = True

    text: str

    def check_arguments(self) -> None:
        _check_text(self.text)


SupervisorCommand = Stop | Rollback | DeleteCheckpoint | Note
"""Executed at once by :class:`~engine.supervisor.commands.command_handler.CommandHandler`."""

BoundaryCommand = (
    Pause | Unpause | Stop | Checkpoint | SetBeta | SetKLController | SetSetting | Undo | Probe
)
"""Executed by every rank at the next step boundary, in :class:`~engine.train.boundary.Boundary`.

A stop is in both unions: with `now`, or while models are loading, it does not wait for a boundary.
"""

AnyCommand = BoundaryCommand | SupervisorCommand

COMMANDS: dict[str, type[Command]] = {kind.name(): kind for kind in get_args(AnyCommand)}
"""Tag → class of the command."""


def check_command(command: Command, moment: Moment) -> None:
    """Checks whether the supervisor can accept a command. A rank may still reject it later.

    Raises:
        CommandRejectedError: the arguments are wrong, or the command does not fit the state.
        JournalError: the session cannot be read.
        OSError: its checkpoints cannot be listed.
    """
    command.check_arguments()
    # The engine of a run that has ended lives until its notifications are sent.
    if moment.state in ENDED_STATES and not isinstance(command, Note):
        raise CommandRejectedError("the run has ended: resume it first")
    if moment.state == "stopping" and not command.while_stopping:
        raise CommandRejectedError("the run is stopping: resume it first")
    command.check(moment)


def check_in_order(
    commands: Sequence[SettingCommand], settings: Settings, config: "RunConfig"
) -> None:
    """Checks commands that follow each other, each against the settings that those before it leave.

    Args:
        commands: none of them is sent yet.
        settings: the current ones.
        config: the other keys of the run.

    Raises:
        CommandRejectedError: one of them would be rejected.
    """
    for command in commands:
        values = command.checked_values(settings, config)
        settings = msgspec.structs.replace(settings, **values)


def check_deletable(step: int, needed: Collection[int], saved: list[int]) -> None:
    """Checks whether a checkpoint can be deleted.

    Args:
        step: of the checkpoint.
        needed: the steps of the checkpoints that a resume may continue from.
        saved: the steps of all checkpoints.

    Raises:
        CommandRejectedError: there is no such checkpoint, or it is needed.
    """
    if step not in saved:
        available = ", ".join(map(str, saved)) if saved else "none yet"
        raise CommandRejectedError(
            f"there is no checkpoint of step {step} (there are: {available})"
        )
    if step in needed:
        raise CommandRejectedError(
            f"the checkpoint of step {step} is the one that a resume continues from"
        )


def _check_text(text: str) -> None:
    if not 0 < len(text.strip()) <= MAX_TEXT:
        raise CommandRejectedError(f"the text must have 1 to {MAX_TEXT} characters")
