"""What the threads and the widgets say to one another."""

from dataclasses import dataclass, field
from typing import Any

from textual.message import Message

from engine.control import Answer, Telemetry
from engine.protocol import Phase

Row = dict[str, Any]
Points = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Head:
    """A session in a few words."""

    state: str
    step: int
    total_steps: int
    settings: Row
    message: str
    attempts: list[Row]
    pid: int | None
    host: str | None


@dataclass(frozen=True)
class News:
    """What a reading brought; what is None has not changed."""

    reset: bool = False
    """Forget everything: another timeline, or another journal."""
    head: Head | None = None
    curves: dict[str, Points] = field(default_factory=dict)
    """Points that follow those of earlier readings."""
    past: dict[str, list[tuple[int, int, float | None]]] = field(default_factory=dict)
    """(attempt, step, value) of timelines that were left."""
    names: list[str] | None = None
    events: list[Row] = field(default_factory=list)
    commands: list[Row] | None = None
    checkpoints: list[Row] | None = None
    samples: list[Row] | None = None
    """The newest step's."""
    phases: list[Phase] | None = None
    telemetry: Telemetry | None = None
    connected: bool | None = None
    problem: str | None = None
    """What prevents reading; empty once it works again."""

    def __bool__(self) -> bool:
        return self != News()

    @property
    def only_now(self) -> bool:
        """Whether it speaks only of what goes on this moment: no curve and no list has changed."""
        return self == News(phases=self.phases, telemetry=self.telemetry, connected=self.connected)


class Heard(Message):
    """The feed has read something."""

    def __init__(self, folder: str, news: News) -> None:
        super().__init__()
        self.folder = folder
        self.news = news


class Answered(Message):
    """A command has come a step further, or could not be sent (`problem`)."""

    def __init__(self, text: str, answer: Answer | None = None, problem: str = "") -> None:
        super().__init__()
        self.text = text
        """The command, for people."""
        self.answer = answer
        self.problem = problem


class Listed(Message):
    """The sessions of the folder, newest first."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


class Started(Message):
    """A command that starts an engine in the background has ended."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__()
        self.name = name
        self.problem = problem


class Chosen(Message):
    """A row of a table was chosen (enter, click)."""

    def __init__(self, table: str, key: Any) -> None:
        super().__init__()
        self.table = table
        self.key = key


class Pointed(Message):
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
