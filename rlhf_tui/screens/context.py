"""Protocols of what a screen may use of the app: screens never import the app itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from textual.notifications import SeverityLevel

from engine.journal.rows import CheckpointRow
from engine.protocol.commands import Command
from engine.session.folder import SessionFolder
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.state.preferences import Preferences
from rlhf_tui.state.runs.listing import SessionListCache
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.steering_target import SteeringTarget
from rlhf_tui.state.viewport import Viewport


class Say(Protocol):
    """Shows a notice for a few seconds. Call it in the app's thread."""

    def __call__(self, text: str, severity: SeverityLevel = "information") -> None:
        """Any text is safe here: it is sanitised, and nothing in it is markup."""


class CommandActions(Protocol):
    """Sending commands to an engine."""

    def send(
        self,
        target: SteeringTarget,
        command: Command,
        text: str,
        post: Callable[[CommandAnswered], object] | None = None,
    ) -> bool:
        """Sends a command after all earlier ones. Returns False, with a notice, without an engine.

        Args:
            target: the run.
            command: what to send.
            text: describes the command in notices.
            post: called with each reply, from another thread; None: the app shows them.
        """

    def run_read(self, target: SteeringTarget) -> None:
        """Call this when a run was read again: effects of commands may be visible now."""


class SteeringActions(Protocol):
    """Commands that a dialog asks about first."""

    def roll_back(self, target: SteeringTarget, step: int, resume: Callable[[bool], None]) -> None:
        """Asks, then sends a rollback to the checkpoint of `step`.

        If the run ends while the question is open, `resume` is called instead, with whether to
        sample with a new seed.
        """

    def ask_roll_back(
        self, target: SteeringTarget, step: int, confirmed: Callable[[bool], None]
    ) -> None:
        """Asks for confirmation; `confirmed` gets whether to sample with a new seed."""

    def delete_checkpoint(
        self, target: SteeringTarget, checkpoint: CheckpointRow, delete: Callable[[], None]
    ) -> None:
        """Asks, then has the engine delete a checkpoint; without an engine, calls `delete`."""


class EngineActions(Protocol):
    """Commands of the CLI, run in a process of their own."""

    def start(self, arguments: list[str], name: str) -> None:
        """Runs `rlhf-tui <arguments> --detach`, and opens the session.

        Args:
            arguments: of the command.
            name: the session.
        """

    def run_command(self, arguments: list[str], done: str) -> None:
        """Runs `rlhf-tui <arguments>`; shows the error, or `done` when it succeeds."""

    def ask_new(self) -> None:
        """Asks for a configuration file, then starts a run from it."""

    def ask_resume(self, name: str, from_step: int | None = None) -> None:
        """Asks for overrides, then resumes a session: from its last checkpoint, or `from_step`."""

    def ask_fork(self, name: str, step: int) -> None:
        """Asks for a name and overrides, then forks `name` from the checkpoint of `step`."""


class Origin(Protocol):
    """The session on another machine that the open one is a copy of."""

    @property
    def address(self) -> str:
        """Its address, `ssh://HOST/NAME`."""

    @property
    def stale(self) -> str:
        """Why the copy is not kept up to date at the moment; empty while it is."""


class AppContext(Protocol):
    """The app as its screens see it."""

    root: Path
    """The folder of sessions."""
    read_only: bool
    """Whether the session's files must not be changed."""
    steers: bool
    """Whether commands may be sent."""
    origin: Origin | None
    """The session that the open one is a copy of; None if it is not a copy."""
    replaying: bool
    """Whether sessions are replayed."""
    who: str
    """The operator's name in the command log and in labels."""
    preferences: Preferences
    listing: SessionListCache
    """Reads the list of sessions, and keeps it."""
    now: Callable[[], float]
    """The wall clock, seconds since the epoch."""

    @property
    def session(self) -> SessionFolder | None:
        """The open session; None in the browser before any was opened."""

    @property
    def state(self) -> SessionState:
        """The state of the open session."""

    @property
    def view(self) -> Viewport:
        """The window and crosshair that the charts share."""

    @property
    def commands(self) -> CommandActions:
        """Sends commands."""

    @property
    def steering(self) -> SteeringActions:
        """Asks, then sends commands."""

    @property
    def engines(self) -> EngineActions:
        """Starts engines."""

    def open_session(self, name: str) -> bool:
        """Follows a session and shows its dashboard; False, with a notice, if there is none."""

    def forget_session(self, name: str) -> None:
        """Stops following a session that is about to be deleted."""

    def read_metrics(self) -> None:
        """Reads the metrics of the charts in the preferences, which have changed."""

    def save_preferences(self) -> None:
        """Writes the preferences in a thread: a home on a network may be slow."""

    def say(self, text: str, severity: SeverityLevel = "information") -> None:
        """Shows a notice; see :class:`Say`."""
