"""What the threads and the widgets say to one another."""

from typing import Any

from textual.message import Message

from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Command
from rlhf_tui.state.session_row import ListedSession
from rlhf_tui.state.updates import SessionUpdate


class SessionUpdated(Message):
    """The feed has read something."""

    def __init__(self, folder: str, news: SessionUpdate) -> None:
        super().__init__()
        self.folder = folder
        self.news = news


class CommandAnswered(Message):
    """A command has come a step further, or could not be sent (`problem`)."""

    def __init__(
        self, text: str, command: Command, answer: CommandReply | None = None, problem: str = ""
    ) -> None:
        super().__init__()
        self.text = text
        """The command, for people."""
        self.command = command
        self.answer = answer
        self.problem = problem


class SessionsListed(Message):
    """The sessions of the folder, newest first."""

    def __init__(self, rows: list[ListedSession]) -> None:
        super().__init__()
        self.rows = rows


class EngineStarted(Message):
    """A command that starts an engine in the background has ended; `said`: its last words."""

    def __init__(self, name: str, problem: str, said: str) -> None:
        super().__init__()
        self.name = name
        self.problem = problem
        self.said = said


class RowSelected(Message):
    """A row of a table was chosen (enter, click)."""

    def __init__(self, table: str, key: Any) -> None:
        super().__init__()
        self.table = table
        self.key = key


class RowHighlighted(Message):
    """The cursor of a table has come to a row."""

    def __init__(self, table: str, key: Any) -> None:
        super().__init__()
        self.table = table
        self.key = key


class CursorMoved(Message):
    """The crosshair of a chart was put on a step (None: taken away)."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step
