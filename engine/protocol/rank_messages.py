"""What processes say to one another: MessagePack structs in length-prefixed frames.

One Unix socket serves both conversations. The first frame of a connection says which it is:
a rank's (:class:`RankHello`) or a client's. A frame is a 4-byte big-endian length and that many
bytes; a longer one than :data:`MAX_FRAME` ends the connection.
"""

from typing import Any

from msgspec import Struct
from msgspec.msgpack import Decoder

from engine import __version__
from engine.config.schema import LaunchConfig
from engine.config.settings import SettingChange
from engine.protocol.commands import BoundaryCommand
from engine.protocol.frames import VERSION, Message, decode


class RankHello(Message, frozen=True, tag="rank_hello"):
    """The first frame of a rank."""

    token: str
    """From the environment the supervisor gave it: proves it is its own."""
    rank: int
    pid: int
    version: int = VERSION


class Phase(Message, frozen=True, tag="phase"):
    """What a rank does now, and how far it is."""

    rank: int
    step: int
    name: str
    """generate, score, reference, optimise, checkpoint, paused; while loading `load policy` …"""
    done: int = 0
    total: int = 0

    @property
    def loading(self) -> bool:
        """Whether it is one of the phases before the first step."""
        return self.name.startswith("load ")


class Ready(Message, frozen=True, tag="ready"):
    """Everything is loaded and checked; training begins."""

    info: dict[str, Any]
    """Parameters, device, prompts and the like, for the event `ready`."""
    settings: dict[str, Any]
    """In force for the first step."""


class Sample(Struct, frozen=True, kw_only=True):
    """One answer of a step."""

    index: int
    """In the step's global batch."""
    prompt: str
    response: str
    score: float
    kl: float
    """Nats, over the whole response."""
    length: int
    """Tokens, end-of-sequence included."""
    ended: bool
    """By itself; false where it was cut off."""
    parts: dict[str, float | None] = {}
    """Each reward source's own score."""
    arrays: "TokenArrays | None" = None


class TokenArrays(Struct, frozen=True, kw_only=True):
    """Per response token, each of the answer's length."""

    tokens: list[str]
    token_ids: list[int]
    logprob: list[float]
    ref_logprob: list[float]
    advantage: list[float]
    value: list[float]
    """Empty where there is no value function."""


class RankTimes(Struct, frozen=True, kw_only=True):
    """What a step took one rank."""

    rank: int
    seconds: dict[str, float]
    """By phase, waiting for the others left out where that can be told."""
    peak_memory: int
    """Bytes: the most it ever held, of the GPU's memory or resident on a CPU."""


class StepReport(Message, frozen=True, tag="step_report"):
    """One finished step."""

    step: int
    metrics: dict[str, float]
    samples: list[Sample]
    settings: dict[str, Any]
    """In force for the *next* step."""
    changes: list[SettingChange] = []
    """Made by the controller after this step."""
    ranks: list[RankTimes] = []
    """Every rank's own times, those on other machines too."""


class CheckpointWritten(Message, frozen=True, tag="checkpoint_written"):
    """A checkpoint is on disk but for its COMPLETE; asks for :class:`Confirm`."""

    step: int
    size: int
    """Bytes."""
    score: float
    kl: float


class CheckpointComplete(Message, frozen=True, tag="checkpoint_complete"):
    """COMPLETE is written."""

    step: int
    removed: list[int] = []
    """Steps of older checkpoints that now make way for it: their folders go next."""


class Applied(Message, frozen=True, tag="applied"):
    """A command took effect before step `step` began (or, for actions, after `step` - 1)."""

    id: str
    step: int
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}


class Rejected(Message, frozen=True, tag="rejected"):
    """A command cannot be carried out."""

    id: str
    reason: str


class Notice(Message, frozen=True, tag="notice"):
    """Something the operator should see: becomes an event `alert`."""

    step: int
    rule: str
    text: str


class Failed(Message, frozen=True, tag="failed"):
    """The rank ends because of an error."""

    rank: int
    text: str
    traceback: str = ""
    user_input: bool = False
    """What the user gave is wrong: no traceback is needed."""
    final: bool = False
    """Raised on purpose: starting again would only meet it again."""
    echo: bool = False
    """Another rank is gone, and this one only noticed: why it went is for others to say."""


class Ended(Message, frozen=True, tag="ended"):
    """The rank ends as it should."""

    step: int
    reason: str
    """finished, stopped or max_hours."""


class Begin(Message, frozen=True, tag="begin"):
    """The answer to :class:`RankHello`: where to start."""

    attempt: int
    from_step: int
    """0: from the configuration's models; else from that step's checkpoint."""
    reseed: int = 0
    """The attempt that was to sample anew from there: part of the seed; 0: no attempt was."""
    checkpoints: list[int] = []
    """Steps of this timeline's checkpoints: of these, older ones make way for new ones."""
    paused: bool = False
    """Hold before the first step: the run was paused when its ranks died."""
    replay: list["ReplayedChange"] = []
    undoable: list[list[SettingChange]] = []
    """What `undo` would take back, the last one first to go."""


class ReplayedChange(Struct, frozen=True, kw_only=True):
    """What a command changed before a crash, to be applied again at the same step."""

    step: int
    command: str
    changes: list[SettingChange]


class Confirm(Message, frozen=True, tag="confirm"):
    """The journal holds everything up to this step: COMPLETE may be written."""

    step: int


class RankCommand(Message, frozen=True, tag="order"):
    """An operator's command, to be carried out at the next step boundary."""

    id: str
    command: BoundaryCommand


class JoinInfo(Struct, frozen=True, kw_only=True):
    """What a machine that joins is told, at the place where the ranks meet."""

    launch: LaunchConfig
    folder: str
    """The session's, which all machines must have under this path."""
    processes: int
    """Ranks on the first machine."""
    start: str
    """Of the ranks, unlike any other: a machine that has left it can only join the next."""
    software: str = __version__


FromRank = (
    RankHello
    | Phase
    | Ready
    | StepReport
    | CheckpointWritten
    | CheckpointComplete
    | Applied
    | Rejected
    | Notice
    | Failed
    | Ended
)

ToRank = Begin | Confirm | RankCommand

_from_rank: Decoder[FromRank] = Decoder(FromRank)
_to_rank: Decoder[ToRank] = Decoder(ToRank)


def decode_from_rank(body: bytes) -> FromRank:
    """A rank's message. Raises LinkError when it is none."""
    return decode(_from_rank, body, "a rank's message")


def decode_to_rank(body: bytes) -> ToRank:
    """A supervisor's message to a rank. Raises LinkError when it is none."""
    return decode(_to_rank, body, "a supervisor's message")
