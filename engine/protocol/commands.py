"""What an operator can ask of a running engine: one frozen struct a command.

A struct declares everything about its command but how it is carried out: its tag on the wire, its
line of help, its checks, the settings it changes, and whether the charts show it. The union that it
is a member of says who carries it out: the supervisor at once (:data:`SupervisorCommand`) or all
ranks at the next step boundary (:data:`BoundaryCommand`).

A command's life is kept in the journal: `queued → accepted → applied at step S`, or
`rejected: reason`. Each works while paused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import msgspec
from msgspec import Struct

from engine.config.settings import Settings, check_settings, setting_name
from engine.errors import CommandRejectedError
from engine.session.states import State

MAX_TEXT = 10_000
"""Characters in a note or a probe."""


@dataclass(frozen=True)
class Moment:
    """How things stand when a command arrives."""

    state: State
    paused: bool
    settings: Settings
    """In force."""
    batch_size: int
    """`rollout.batch_size`."""
    checkpoint_steps: Callable[[], list[int]]
    """The steps that a roll back may name; reads the journal and may raise JournalError."""


class Command(Struct, frozen=True, kw_only=True, tag_field="command", forbid_unknown_fields=True):
    """The base of all commands, and what each of them declares."""

    summary: ClassVar[str]
    """One line for the help of the command line."""
    on_charts: ClassVar[bool]
    """Whether it draws a marker of its own once it is applied."""
    while_stopping: ClassVar[bool] = False
    """Whether it is accepted while the run is stopping."""
    state_when_accepted: ClassVar[State | None] = None
    """The session's state until it is applied, where that is another one."""
    dropped_after_failures: ClassVar[bool] = True
    """Whether it is rejected when the ranks fail again and again with it in hand."""

    @classmethod
    def name(cls) -> str:
        """Its tag, as in the journal and on the command line: `pause`, `beta`."""
        return str(cls.__struct_config__.tag)

    def check_arguments(self) -> None:
        """Raises CommandRejectedError where its own values are wrong at any moment."""

    def check(self, moment: Moment) -> None:
        """Raises CommandRejectedError where it cannot be carried out at this moment."""

    def new_values(self, settings: Settings) -> dict[str, Any]:
        """What it changes settings to, checked against their types and ranges; {} for none.

        Raises:
            CommandRejectedError: an unknown setting, a wrong type or a value out of range.
        """
        del settings
        return {}


class Pause(Command, frozen=True, tag="pause"):
    """The ranks hold at the next step boundary."""

    summary: ClassVar[str] = "Pause at the next step boundary."
    on_charts: ClassVar[bool] = True
    state_when_accepted: ClassVar[State | None] = "pausing"
    dropped_after_failures: ClassVar[bool] = False  # a run must not go on for having failed

    def check(self, moment: Moment) -> None:
        if moment.paused or moment.state == "pausing":
            raise CommandRejectedError("the run is paused already")


class Unpause(Command, frozen=True, tag="unpause"):
    """The end of a pause."""

    summary: ClassVar[str] = "Resume a paused run."
    on_charts: ClassVar[bool] = True

    def check(self, moment: Moment) -> None:
        if not moment.paused and moment.state != "pausing":
            raise CommandRejectedError("the run is not paused")


class Stop(Command, frozen=True, tag="stop"):
    """The end of the run: after the step in hand, saved; with `now` at once, unsaved."""

    summary: ClassVar[str] = "Finish the current step, save a checkpoint and stop."
    on_charts: ClassVar[bool] = True
    while_stopping: ClassVar[bool] = True
    state_when_accepted: ClassVar[State | None] = "stopping"
    dropped_after_failures: ClassVar[bool] = False  # as for a pause

    now: bool = False

    def check(self, moment: Moment) -> None:
        if moment.state == "stopping" and not self.now:
            raise CommandRejectedError("the run is stopping already")


class Checkpoint(Command, frozen=True, tag="checkpoint"):
    """A checkpoint at the next step boundary."""

    summary: ClassVar[str] = "Save a checkpoint at the next step boundary."
    on_charts: ClassVar[bool] = False  # the checkpoint's own event is


class SettingCommand(Command, frozen=True):
    """The base of those that change settings; :meth:`new_values` says which."""

    on_charts: ClassVar[bool] = True

    def check(self, moment: Moment) -> None:
        now = msgspec.structs.asdict(moment.settings) | self.new_values(moment.settings)
        least = 0.2 * moment.batch_size
        # As for the configuration: one step may not take beta to zero or below.
        if now["controller"] == "adaptive" and now["horizon"] <= least:
            raise CommandRejectedError(
                f"horizon ({now['horizon']:g}) must exceed {least:g}, a fifth of the batch"
            )


class SetBeta(SettingCommand, frozen=True, tag="beta"):
    """A KL coefficient; an adaptive controller goes on from it."""

    summary: ClassVar[str] = "Set beta, the KL coefficient."

    value: float

    def new_values(self, settings: Settings) -> dict[str, Any]:
        return check_settings(settings, {"beta": self.value})


class SetKLController(SettingCommand, frozen=True, tag="kl"):
    """The KL controller and what it aims at; what is None stays as it is."""

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
    """One setting's new value, by its own name or its configuration key."""

    summary: ClassVar[str] = "Change a setting, such as learning_rate=1e-5."

    key: str
    value: Any

    def new_values(self, settings: Settings) -> dict[str, Any]:
        return check_settings(settings, {setting_name(self.key): self.value})


class Undo(Command, frozen=True, tag="undo"):
    """The last change of a setting that an operator made, taken back."""

    summary: ClassVar[str] = "Undo the last change of a setting."
    on_charts: ClassVar[bool] = True


class Rollback(Command, frozen=True, tag="rollback"):
    """A new attempt, in place, from an earlier checkpoint."""

    summary: ClassVar[str] = "Return to the checkpoint of STEP and continue from there."
    on_charts: ClassVar[bool] = True

    step: int
    reseed: bool = False

    def check(self, moment: Moment) -> None:
        steps = moment.checkpoint_steps()
        if self.step not in steps:
            have = ", ".join(map(str, steps)) if steps else "none yet"
            raise CommandRejectedError(
                f"there is no checkpoint of step {self.step} (there is: {have})"
            )


class Probe(Command, frozen=True, tag="probe"):
    """A prompt for the current policy and for the reference."""

    summary: ClassVar[str] = "Generate a response to TEXT with policy and reference."
    on_charts: ClassVar[bool] = False

    text: str

    def check_arguments(self) -> None:
        _check_text(self.text)


class Note(Command, frozen=True, tag="note"):
    """A line in the journal."""

    summary: ClassVar[str] = "Add a note to the session's journal."
    on_charts: ClassVar[bool] = False  # the note's own event is
    while_stopping: ClassVar[bool] = True

    text: str

    def check_arguments(self) -> None:
        _check_text(self.text)


SupervisorCommand = Stop | Rollback | Note
"""Carried out at once by :class:`~engine.supervisor.command_handler.CommandHandler`."""

BoundaryCommand = (
    Pause | Unpause | Stop | Checkpoint | SetBeta | SetKLController | SetSetting | Undo | Probe
)
"""Carried out by every rank at the next step boundary, :class:`~engine.train.boundary.Boundary`.

A stop is both: with `now`, or while the models are loaded, there is no boundary to wait for."""

AnyCommand = BoundaryCommand | SupervisorCommand

COMMANDS: dict[str, type[Command]] = {kind.name(): kind for kind in get_args(AnyCommand)}
"""Tag → command."""


def check_command(command: Command, moment: Moment) -> None:
    """Whether a command can be accepted, as far as this can be told without asking a rank.

    Raises:
        CommandRejectedError: says what is wrong with it, or with the moment.
        JournalError: the session cannot be read.
    """
    command.check_arguments()
    if moment.state == "stopping" and not command.while_stopping:
        raise CommandRejectedError("the run is stopping; resume it first")
    command.check(moment)


def _check_text(text: str) -> None:
    if not 0 < len(text.strip()) <= MAX_TEXT:
        raise CommandRejectedError(f"the text must have 1 to {MAX_TEXT} characters")
