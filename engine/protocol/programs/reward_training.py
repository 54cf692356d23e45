"""The request of `rlhf-tui reward train` to the process that trains, and the result."""

from msgspec import Struct

from engine.config.schema import RunConfig
from engine.config.sections.reward_training import RewardTrainingConfig
from engine.protocol.rank_messages import SampleMessages


class JudgedText(Struct, frozen=True, kw_only=True):
    """A response that was judged, or one of the newest."""

    session: int
    """Index of its session."""
    prompt: str
    """As the policy read it: chat messages rendered by the chat template."""
    response: str
    messages: SampleMessages | None = None
    """Set for conversations with an environment, if they are recorded."""
    ended: bool = True
    """False if it was truncated."""
    score: float | None = None
    """Recorded score, from the reward in force at its step; None for the reference's responses."""


class RewardTrainingRequest(Struct, frozen=True, kw_only=True):
    """The data to train on, the model to start from, and the folder to write."""

    sessions: list[str]
    """Names."""
    configs: list[RunConfig]
    """The configuration of each session."""
    responses: list[JudgedText]
    preferences: list[tuple[int, int]]
    """Indices of the chosen and of the rejected response."""
    labels: list[tuple[int, bool]]
    """Index of the response, and whether it is good."""
    newest: list[int]
    """Indices of the sessions' newest responses, to compare the scales of the rewards on."""
    base: str | None
    """The model to start from; None for the reward model of the first session."""
    out: str
    """The folder to write."""
    command: str
    """For the model's card."""
    settings: RewardTrainingConfig


class TrainingProgress(Struct, frozen=True, tag="progress"):
    """A line for the waiting user."""

    text: str


class HeldOutAgreement(Struct, frozen=True, kw_only=True):
    """The agreement of scores with the held-out judgements."""

    judgements: int
    """Those that could be compared."""
    agreement: float
    """See :mod:`engine.agreement`."""
    low: float
    high: float
    """The 95 % interval."""


class Calibration(Struct, frozen=True, kw_only=True):
    """How well σ(difference of two scores) predicts the probability of a held-out preference."""

    comparisons: int
    """Preferences, and pairs of a good response and another one."""
    stated: float
    """Mean probability that the model gives to the response it scores higher."""
    right: float
    """Share of the comparisons in which that response was judged better."""
    log_loss: float
    """Nats; 0.693 for guessing."""


class ScoreScale(Struct, frozen=True):
    """The distribution of the scores of the sessions' newest responses."""

    mean: float
    std: float


SAME_WIDTH = (0.8, 1.25)
"""Ratios of two standard deviations between which `kl.beta` can stay as it is."""


class TrainedReward(Struct, frozen=True, kw_only=True):
    """The result."""

    out: str
    base: str
    device: str
    preferences: int
    good: int
    other: int
    """Labels `bad` and `hack`."""
    trained_on: int
    """Judgements."""
    validated_on: int
    held_out: int
    split_by: str
    """The unit that is never on both sides of the split: `prompt` or `response`."""
    epochs: int
    best_epoch: int
    losses: list[tuple[float, float]]
    """Loss on the judgements for training and for validation, after each epoch."""
    in_force: HeldOutAgreement | None
    """The agreement of the recorded scores; None if none could be compared."""
    at_start: HeldOutAgreement | None
    """The agreement of the model before training; None if its head is new."""
    trained: HeldOutAgreement
    calibration: Calibration
    old_scale: ScoreScale | None
    """The scale of the recorded scores."""
    new_scale: ScoreScale
    label: int | None = None
    """The trained logit; None if the model has only one."""
    pair: bool = False
    """Whether it reads prompt and response as a pair of texts."""
    notes: list[str] = []

    @property
    def width(self) -> float | None:
        """Ratio of the scores' standard deviation to that of the recorded ones; None if unknown."""
        old, new = self.old_scale, self.new_scale
        return new.std / old.std if old is not None and old.std and new.std else None

    @property
    def warning(self) -> str:
        """Why the model should not be used yet, in one sentence; empty if it can be."""
        found = self.trained
        if found.low > 0.5:
            return ""
        return (
            f"{found.judgements} held-out judgements do not show that the model agrees better than "
            "chance: judge more responses before you use it"
        )

    @property
    def keeps_width(self) -> bool:
        """Whether :attr:`width` is within :data:`SAME_WIDTH`."""
        low, high = SAME_WIDTH
        return self.width is not None and low <= self.width <= high
