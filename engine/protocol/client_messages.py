"""Messages between clients (the TUI, `ctl`) and a supervisor.

The socket carries commands and notifications; clients read the data itself from the journal. The
client's first message is :class:`ClientHello`, and the supervisor replies with :class:`Welcome`.
:class:`CommandRequest`, :class:`StatusRequest` and :class:`Watch` follow in any order.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from engine.config.settings import SettingChange
from engine.errors import LinkError
from engine.protocol.commands import AnyCommand
from engine.protocol.frames import VERSION, Message, decoder
from engine.protocol.rank_messages import Phase


class ClientHello(Message, frozen=True, tag="client_hello"):
    """The first message of a client."""

    who: str
    """User, terminal and SSH client; recorded with each command."""
    version: int = VERSION


class CommandRequest(Message, frozen=True, tag="request"):
    """A command. A request with a repeated id is not carried out again, but gets a reply."""

    id: str
    command: AnyCommand


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Requests :class:`Status`."""


class Watch(Message, frozen=True, tag="watch"):
    """Subscribes to :class:`JournalAdvanced`, :class:`Phase` and :class:`Telemetry`."""


class WatchRefused(Message, frozen=True, tag="watch_refused"):
    """Sent instead of the first of these if too many clients watch. The connection is closed."""

    reason: str


class Welcome(Message, frozen=True, tag="welcome"):
    """The reply to :class:`ClientHello`. If the versions differ, the connection is closed."""

    pid: int
    version: int = VERSION
    software: str = ""
    refused: str = ""
    """The reason, if an engine of an earlier version closes the connection; otherwise empty."""


class CommandReply(Message, frozen=True, tag="answer"):
    """The status of a command: sent on its arrival and at each change of its status."""

    id: str
    status: str
    """accepted, applied or rejected."""
    step: int | None = None
    """First step with the change in effect; None unless applied."""
    reason: str = ""
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}
    """For a probe: `policy` and `reference`, each with `response`, `score` and `kl`."""

    @property
    def final(self) -> bool:
        """Whether this is the last reply to the command."""
        return self.status in ("applied", "rejected")


class Gpu(Struct, frozen=True, kw_only=True):
    """Readings of one GPU, from its driver."""

    index: int
    name: str
    utilisation: float | None
    """Percent; None for a part of a GPU (MIG) and others that do not measure it."""
    memory_used: int
    memory_total: int
    """Bytes; 0 for a GPU that uses the host's memory."""
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""


class RankLoad(Struct, frozen=True, kw_only=True):
    """Resource use of one rank. `pid`, `cpu` and `memory` are 0 for a rank on another machine."""

    rank: int
    pid: int
    cpu: float
    """Percent of one core."""
    memory: int
    """Resident bytes."""
    seconds: dict[str, float] = {}
    """Seconds of the last step by phase."""
    peak_memory: int = 0
    """Peak bytes so far: GPU memory, or resident memory on a CPU."""
    on_gpu: bool = False
    """Whether the peak is of GPU memory. `memory` is the host's in either case."""


class Telemetry(Message, frozen=True, tag="telemetry"):
    """Readings of the machine, taken every few seconds. Memory and disk are in bytes."""

    time: float
    cpu: float
    """Percent of all cores."""
    memory_used: int
    memory_total: int
    disk_free: int
    ranks: list[RankLoad] = []
    gpus: list[Gpu] = []


class Status(Message, frozen=True, tag="status"):
    """The reply to :class:`StatusRequest`."""

    state: str
    step: int
    total_steps: int
    attempt: int
    settings: dict[str, Any]
    phases: list[Phase]
    """The latest phase of each rank."""
    boundary_in: float | None
    """Estimated seconds until the next step boundary."""
    telemetry: Telemetry | None
    watchers: int
    pid: int
    pause_reason: str | None = None
    """What paused the run: `kl_high at step 4: KL 7.26 > 6`. None if a person did, or if the run is
    not paused."""


class JournalAdvanced(Message, frozen=True, tag="wake"):
    """The journal has rows up to this step and this event."""

    step: int
    event: int
    state: str


FromClient = ClientHello | CommandRequest | StatusRequest | Watch
ToClient = Welcome | CommandReply | Status | WatchRefused | JournalAdvanced | Phase | Telemetry

_decode_from_client: Callable[[bytes], FromClient] = decoder(FromClient, "a client's message")


def decode_from_client(body: bytes) -> FromClient:
    """Decodes a message of a client. Raises LinkError if the body is not one."""
    message = _decode_from_client(body)
    if isinstance(message, CommandRequest):
        try:
            msgspec.json.encode(message.command)
        except (TypeError, ValueError, RecursionError) as error:
            # MessagePack has extensions and keys that are no text; the journal is JSON.
            raise LinkError(f"not a command that can be recorded: {error}") from error
    return message


decode_to_client: Callable[[bytes], ToClient] = decoder(ToClient, "an engine's message")
"""Decodes a message of a supervisor to a client. Raises LinkError if the body is not one."""
