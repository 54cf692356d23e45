"""Messages between threads, widgets, screens and the app."""

from typing import Any

from msgspec import Struct
from textual.message import Message

from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Command
from engine.session.folder import SessionFolder
from rlhf_tui.state.checkpoint_details import CheckpointDetails
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.runs.session_preview import SessionPreview
from rlhf_tui.state.runs.session_row import ListedSession


class SessionUpdated(Message):
    """The feed has read something of the session in `folder`."""

    def __init__(self, folder: str, update: SessionUpdate) -> None:
        super().__init__()
        self.folder = folder
        self.update = update


class CommandAnswered(Message):
    """A reply to a command, or why it could not be sent (`problem`)."""

    def __init__(
        self,
        session: SessionFolder,
        text: str,
        command: Command,
        reply: CommandReply | None = None,
        problem: str = "",
    ) -> None:
        super().__init__()
        self.session = session
        self.text = text
        """Describes the command in notices."""
        self.command = command
        self.reply = reply
        self.problem = problem


class SessionsListed(Message):
    """The sessions of the folder, newest first."""

    def __init__(self, rows: list[ListedSession]) -> None:
        super().__init__()
        self.rows = rows


class SessionPreviewed(Message):
    """The preview of a session was read."""

    def __init__(self, preview: SessionPreview) -> None:
        super().__init__()
        self.preview = preview


class CheckpointRead(Message):
    """The details of a checkpoint of the session in `folder` were read."""

    def __init__(self, folder: str, details: CheckpointDetails) -> None:
        super().__init__()
        self.folder, self.details = folder, details


class CommandResult(Struct, frozen=True):
    """The output of a command of the CLI."""

    problem: str = ""
    """The last line of its error output; empty if it succeeded."""
    last_line: str = ""
    """The last line of its output."""
    notices: list[str] = []
    """The other lines that the CLI itself wrote to its error output, such as what a fork keeps."""


class EngineStarted(Message):
    """A command that starts an engine in the background has ended."""

    def __init__(self, name: str, result: CommandResult) -> None:
        super().__init__()
        self.name = name
        self.result = result


class EnginesAsked(Message):
    """Engines were asked what they wait for; `waits` has the answers by session name."""

    def __init__(self, waits: dict[str, str]) -> None:
        super().__init__()
        self.waits = waits


class RowSelected(Message):
    """A row of a table was selected (enter, click)."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key


class RowHighlighted(Message):
    """The cursor of a table is on another row."""

    def __init__(self, table: str, key: Any, *, moved: bool = True) -> None:
        super().__init__()
        self.table = table
        self.key = key
        self.moved = moved
        """Whether somebody moved the cursor; False if the rows have changed."""


class HeaderSelected(Message):
    """The title of a table's column was clicked."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title


class ChartZoomed(Message):
    """The mouse wheel was turned over a chart; `factor` is that of the steps shown."""

    def __init__(self, factor: float, step: float) -> None:
        super().__init__()
        self.factor = factor
        self.step = step
        """The one under the pointer, which keeps its place."""


class ChartPanned(Message):
    """The wheel was turned sideways, or with shift; `share` is that of the window's width."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share


class CursorMoved(Message):
    """The crosshair of a chart was moved to a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
