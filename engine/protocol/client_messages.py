"""What clients (the TUI, `ctl`) and a supervisor say to each other.

The socket carries commands and wake-ups; the data itself is read from the journal. The first frame
is the client's :class:`ClientHello`, answered by :class:`Welcome`; then :class:`CommandRequest`,
:class:`StatusRequest` and :class:`Watch` in any order.
"""

from typing import Any

from msgspec import Struct
from msgspec.msgpack import Decoder

from engine.config.settings import SettingChange
from engine.protocol.commands import AnyCommand
from engine.protocol.frames import VERSION, Message, decode
from engine.protocol.rank_messages import Phase


class ClientHello(Message, frozen=True, tag="client_hello"):
    """The first frame of a client."""

    who: str
    """User, terminal, SSH client: stands in the journal beside each command."""
    version: int = VERSION


class CommandRequest(Message, frozen=True, tag="request"):
    """A command. Sent twice with one id, it acts once and is answered twice."""

    id: str
    command: AnyCommand


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Asks for a :class:`Status`."""


class Watch(Message, frozen=True, tag="watch"):
    """Asks for each :class:`JournalAdvanced`, :class:`Phase` and :class:`Telemetry` from now on."""


class Welcome(Message, frozen=True, tag="welcome"):
    """The engine's hello; a connection of another version is then closed."""

    pid: int
    version: int = VERSION
    software: str = ""


class CommandReply(Message, frozen=True, tag="answer"):
    """Where a command stands. One comes at once, and one at each change until its end."""

    id: str
    status: str
    """accepted, applied or rejected."""
    step: int | None = None
    """Applied: in force from this step on."""
    reason: str = ""
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}
    """Of a probe: `policy` and `reference`, each with `response`, `score`, `kl`."""

    @property
    def final(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ("applied", "rejected")


class Gpu(Struct, frozen=True, kw_only=True):
    """One device, as its driver sees it."""

    index: int
    name: str
    utilisation: float
    """Percent."""
    memory_used: int
    memory_total: int
    """Bytes."""
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""


class RankLoad(Struct, frozen=True, kw_only=True):
    """One rank's process; of one on another machine `pid`, `cpu` and `memory` are 0."""

    rank: int
    pid: int
    """0 on another machine, whose processes cannot be seen from here."""
    cpu: float
    """Percent of one core."""
    memory: int
    """Bytes resident."""
    seconds: dict[str, float] = {}
    """Of the last step, by phase: generate, score, reference, optimise."""
    peak_memory: int = 0
    """The most bytes it ever held: of the GPU's memory, or resident on a CPU."""


class Telemetry(Message, frozen=True, tag="telemetry"):
    """The machine, every few seconds."""

    time: float
    cpu: float
    """Percent of all cores."""
    memory_used: int
    memory_total: int
    disk_free: int
    ranks: list[RankLoad] = []
    gpus: list[Gpu] = []


class PendingCommand(Struct, frozen=True, kw_only=True):
    """A command that has not ended yet."""

    id: str
    command: str
    who: str
    status: str


class Status(Message, frozen=True, tag="status"):
    """The answer to :class:`StatusRequest`."""

    state: str
    step: int
    total_steps: int
    attempt: int
    settings: dict[str, Any]
    phases: list[Phase]
    """The latest of each rank."""
    step_seconds: float | None
    """How long a step takes, lately."""
    boundary_in: float | None
    """Seconds until the next step boundary, reckoned."""
    pending: list[PendingCommand]
    telemetry: Telemetry | None
    watchers: int
    pid: int


class JournalAdvanced(Message, frozen=True, tag="wake"):
    """The journal holds rows up to these."""

    step: int
    event: int
    state: str


FromClient = ClientHello | CommandRequest | StatusRequest | Watch
ToClient = Welcome | CommandReply | Status | JournalAdvanced | Phase | Telemetry

_from_client: Decoder[FromClient] = Decoder(FromClient)
_to_client: Decoder[ToClient] = Decoder(ToClient)


def decode_from_client(body: bytes) -> FromClient:
    """A client's message. Raises LinkError when it is none."""
    return decode(_from_client, body, "a client's message")


def decode_to_client(body: bytes) -> ToClient:
    """A supervisor's message to a client. Raises LinkError when it is none."""
    return decode(_to_client, body, "an engine's message")
