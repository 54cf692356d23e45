"""Messages between ranks and their supervisor.

Ranks and clients connect to the same Unix socket. The first message tells them apart:
:class:`RankHello` or :class:`~engine.protocol.client_messages.ClientHello`.
"""

from collections.abc import Callable
from typing import Any

from msgspec import Struct, field

from engine import __version__
from engine.config.sections.launch import LaunchConfig
from engine.config.settings import SettingChange
from engine.protocol.commands import BoundaryCommand
from engine.protocol.frames import VERSION, Message, decoder

WAIT_FOR = "wait for "
"""Prefix of the name of a phase in which the run waits for something an operator can do."""
ROOM = "room on the disk"
"""What a run waits for if its journal or its last step cannot be written."""


class RankHello(Message, frozen=True, tag="rank_hello"):
    """The first message of a rank."""

    token: str
    """Shows that the rank is one of the supervisor's, which set it in the rank's environment."""
    rank: int
    version: int = VERSION


class Phase(Message, frozen=True, tag="phase"):
    """The current phase of a rank, and its progress."""

    rank: int
    step: int
    name: str
    """One of :data:`engine.metrics.PHASES`, or `paused`; at the start `load policy` etc."""
    done: int = 0
    total: int = 0

    @property
    def loading(self) -> bool:
        """Whether the rank is still loading, before its first step."""
        return self.name.startswith("load ")

    @property
    def waits_for(self) -> str:
        """What the run waits for: `room on the disk`; empty in all other phases."""
        return self.name.removeprefix(WAIT_FOR) if self.name.startswith(WAIT_FOR) else ""


class Ready(Message, frozen=True, tag="ready"):
    """Models and data are loaded; training begins."""

    info: dict[str, Any]
    """Numbers of parameters and prompts, device and the like, for the event `ready`."""
    settings: dict[str, Any]
    """Settings of the first step."""


class Sample(Struct, frozen=True, kw_only=True):
    """One response of a step."""

    index: int
    """Index in the step's global batch."""
    prompt: str
    response: str
    score: float
    kl: float
    """Nats, summed over the response."""
    length: int
    """Tokens, including the end-of-sequence token."""
    ended: bool
    """False if the response was truncated."""
    parts: dict[str, float | None] = {}
    """Score of each reward source."""
    turn_scores: dict[str, list[float]] = {}
    """Scores of the policy's turns by the reward sources that give them."""
    weights_version: int | None = None
    """The step whose update produced the weights that sampled it; None if unknown."""
    replies: list[tuple[int, int]] | None = None
    """Start and end of each reply of the environment in the response, in characters; None without
    an environment."""
    messages: "SampleMessages | None" = None
    """Set for conversations with an environment."""
    arrays: "TokenArrays | None" = None


class SampleMessages(Struct, frozen=True):
    """A prompt and its response as chat messages, with `role` and `content`."""

    prompt: list[dict[str, str]]
    response: list[dict[str, str]]
    """Those of the policy and of its environment."""


class TokenArrays(Struct, frozen=True, kw_only=True):
    """Values per token of a response; each list of these has the length of the response.

    The tokens are those that the policy sampled, without the replies of an environment.
    """

    tokens: list[str]
    token_ids: list[int]
    logprob: list[float]
    ref_logprob: list[float]
    advantage: list[float]
    value: list[float]
    """Empty without a value function."""
    before_replies: list[int] = []
    """For each reply of the environment, the number of tokens before it."""


class RankTimes(Struct, frozen=True, kw_only=True):
    """Time and memory that a step took on one rank."""

    rank: int
    seconds: dict[str, float]
    """Seconds by phase, without the time spent waiting for other ranks where it is known."""
    peak_memory: int
    """Peak bytes so far: GPU memory, or resident memory on a CPU."""
    on_gpu: bool = False


class StepReport(Message, frozen=True, tag="step_report"):
    """The results of a finished step."""

    step: int
    metrics: dict[str, float]
    samples: list[Sample]
    settings: dict[str, Any]
    """Settings of the *next* step."""
    changes: list[SettingChange] = []
    """Changes that the KL controller made after this step."""
    ranks: list[RankTimes] = []
    """Times of all ranks, on all machines."""
    reference_mix: float | None = None
    """Share of the policy in the reference's update before this step; None if there was none."""
    evaluated: list[Sample] = []
    """Responses to held-out prompts, if there was an evaluation after the step."""


class EvaluationReport(Message, frozen=True, tag="baseline_report"):
    """The results of an evaluation that a step's report is without.

    It is the one before the first step, or one that was made up for. The tag is older than the
    second; it must stay, as in :class:`RepeatedChange`.
    """

    metrics: dict[str, float]
    """Those that were missing."""
    samples: list[Sample]
    step: int = 0
    """The last finished step."""


class CheckpointWritten(Message, frozen=True, tag="checkpoint_written"):
    """All files of a checkpoint except COMPLETE are on disk; requests :class:`Confirm`."""

    step: int
    size: int
    """Bytes."""
    score: float | None
    kl: float | None
    """NaN or None if it is not finite."""


class CheckpointComplete(Message, frozen=True, tag="checkpoint_complete"):
    """The file COMPLETE of a checkpoint is written; requests another :class:`Confirm`."""

    step: int
    removed: list[int] = []
    """Steps of older checkpoints whose folders are deleted next, unless they are needed."""


class CheckpointKept(Message, frozen=True, tag="checkpoint_kept"):
    """An operator asked for the checkpoint of a step, which is complete: it is kept."""

    step: int


class Applied(Message, frozen=True, tag="applied"):
    """A command took effect between steps `step` - 1 and `step`."""

    id: str
    step: int
    changes: list[SettingChange] = []
    result: dict[str, Any] = {}


class Rejected(Message, frozen=True, tag="rejected"):
    """A command cannot be carried out."""

    id: str
    reason: str


REWARD_CHANGED = "reward_changed"
"""The rule of the notice that another reward computes the scores from the next step on."""
REWARD_FAILED = "reward"
"""The rule of a pause, and of notices, about a reward that cannot be computed."""
LAST_SAVE_WAITS = "last_save"
"""The rule of the notice that a run waits for room on the disk to save its last step."""


class Notice(Message, frozen=True, tag="notice"):
    """A notice for the operator, recorded as an event `alert`."""

    step: int
    rule: str
    text: str


class Paused(Message, frozen=True, tag="paused"):
    """The ranks have paused by themselves, before a step that they could not complete.

    They try it again when a command ends the pause.
    """

    step: int
    """The last completed step."""
    rule: str
    """Name of the alert."""
    reason: str
    """`reward 'score' at step 5: ValueError: …`."""
    traceback: str = ""
    recovers: bool = False
    """Whether the ranks end the pause themselves once its reason is gone."""


class Unpaused(Message, frozen=True, tag="unpaused"):
    """The ranks have ended a pause by themselves, because its reason is gone."""

    step: int
    """The last completed step."""
    rule: str
    """Name of the notice."""
    text: str


class Adjusted(Message, frozen=True, tag="adjusted"):
    """The ranks have changed settings by themselves, to be able to continue."""

    step: int
    """The first step with the changes in effect."""
    changes: list[SettingChange]
    rule: str
    """Name of the notice."""
    text: str


class Failed(Message, frozen=True, tag="failed"):
    """The rank exits because of an error."""

    rank: int
    text: str
    traceback: str = ""
    user_input: bool = False
    """The user's input is wrong: no traceback is needed."""
    final: bool = False
    """A restart would fail in the same way."""
    echo: bool = False
    """A consequence of the loss of another rank, whose error is the cause."""
    damaged: bool = False
    """The checkpoint to start from is damaged; an older one may be whole."""
    step: int = 0
    """The step that failed, if `changes` are to be made before it."""
    changes: list[SettingChange] = []
    """Settings with which a restart would not fail in the same way, even if `final`."""


RESTART_REASONS = {
    "joining": "another machine joins: the ranks start again from step {}",
    "leaving": "a machine is about to be taken away: the ranks start again from step {} without it",
}
"""Reasons for which the ranks of a run over several machines end although the run goes on."""


class Ended(Message, frozen=True, tag="ended"):
    """The rank exits normally."""

    step: int
    reason: str
    """finished, stopped, max_hours, stop_at, deadline, preempted, or one of RESTART_REASONS."""


class Begin(Message, frozen=True, tag="begin"):
    """The reply to :class:`RankHello`: where to start."""

    attempt: int
    from_step: int
    """Step of the checkpoint to load; 0 to start from the configuration's models."""
    reseed: int = 0
    """Attempt that was started with `--reseed` from this step, part of the seed; 0 for none."""
    average: bool = False
    """Start with the checkpoint's averaged policy instead of the policy (`fork --ema`)."""
    unevaluated: bool = False
    """Whether the journal has that step without an evaluation; one that was due is made up for."""
    recorded: list[str] = []
    """Metrics of that step in the journal, if this engine has recorded it, so with the same
    configuration; otherwise empty. What an evaluation lacks is made up for."""
    checkpoints: list[int] = []
    """Steps of the timeline's checkpoints, from which old ones are deleted."""
    kept: list[int] = []
    """Those of them that are not deleted, because an operator saved them."""
    kept_aside: dict[int, int] = {}
    """Step → attempt of checkpoints that an operator saved on branches that are abandoned now, or 0
    if the journal does not have them. A checkpoint of the same step does not replace them."""
    journal: tuple[int, int] | None = None
    """Device and inode of the session's journal: where another file is, so is another session."""
    best: dict[int, float] = {}
    """`train.best_metric` of these steps in the journal, where they have it. A checkpoint whose
    evaluation was made up for after it was saved does not have it."""
    placed: "Placed | None" = None
    """How the last attempt that loaded had placed the models; None before the first."""
    paused: bool = False
    """Pause before the first step, because the run was paused when its ranks died."""
    repeat: list["RepeatedChange"] = field(default_factory=list, name="replay")
    """Changes after the checkpoint that the ranks apply again. The name in the message must stay: a
    supervisor may outlive an upgrade of the package that its next ranks are started from."""
    undoable: list[list[SettingChange]] = []
    """Changes that `undo` can revert; the last list is reverted first."""


class Placed(Struct, frozen=True, kw_only=True):
    """How the models were placed on the ranks of an attempt."""

    ranks: int
    strategy: str
    """`ddp` or `fsdp`."""
    device: str = ""
    """Rank 0's, such as `cuda:0`; empty if that was not recorded."""


class RepeatedChange(Struct, frozen=True, kw_only=True):
    """A command before a crash, whose changes are to be applied again at the same step."""

    step: int
    command: str
    changes: list[SettingChange]


class Confirm(Message, frozen=True, tag="confirm"):
    """The journal has what the rank reported of a checkpoint.

    After :class:`CheckpointWritten`: everything up to this step, so the rank can write COMPLETE.
    After :class:`CheckpointComplete`: which older checkpoints it may remove.
    """

    step: int
    alerts: list[int] = []
    """For each guard rail whose alert has not cleared, the step of the first one, in order."""
    needed: list[int] = []
    """Steps of checkpoints that must not be removed now: a roll back to one is under way."""


class RankCommand(Message, frozen=True, tag="order"):
    """An operator's command, to be executed at the next step boundary."""

    id: str
    command: BoundaryCommand


class Preempted(Message, frozen=True, tag="preempted"):
    """A scheduler's signal has arrived: the run has no time to wait for room on the disk."""


JOIN_INFO_KEY = "join_info"
"""The key of the :class:`JoinInfo` of the current start, in the store of the first machine."""
LEAVING_KEY = "leaving"
"""Set by a machine that a scheduler is about to take away: the run saves and ends."""
STARTED_KEY = "agents/count"
"""Exists once the machines of this start are settled: others wait for the next start."""
COMING_KEY = "agents/coming"
"""Counts the other machines that are starting their agents, which takes some seconds."""
WAITING_KEY = "waiting"
"""Set by a machine that waits for the next start: the run restarts its ranks after its next
checkpoint.
"""


class JoinInfo(Struct, frozen=True, kw_only=True):
    """What a joining machine needs to know; published in the store of the first machine."""

    launch: LaunchConfig
    folder: str
    """Folder of the session, at the same path on all machines."""
    processes: int
    """Ranks on the first machine."""
    start: str
    """Unique id of this start of the ranks. A machine that left it can only join the next one."""
    software: str = __version__


FromRank = (
    RankHello
    | Phase
    | Ready
    | StepReport
    | EvaluationReport
    | CheckpointWritten
    | CheckpointComplete
    | CheckpointKept
    | Applied
    | Rejected
    | Notice
    | Paused
    | Unpaused
    | Adjusted
    | Failed
    | Ended
)

ToRank = Begin | Confirm | RankCommand | Preempted

decode_from_rank: Callable[[bytes], FromRank] = decoder(FromRank, "a rank's message")
"""Decodes a message of a rank. Raises LinkError if the body is not one."""
decode_to_rank: Callable[[bytes], ToRank] = decoder(ToRank, "a supervisor's message")
"""Decodes a message of a supervisor to a rank. Raises LinkError if the body is not one."""
