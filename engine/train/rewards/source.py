"""The interface of reward sources.

To add a kind of source, write a module with a class that implements :class:`Reward` and a
:class:`SourceKind`, and list the latter in :data:`engine.train.rewards.mix.KINDS` by the
configuration key that selects it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from torch import Tensor

from engine.config.sections.reward import RewardConfig, RewardSource
from engine.errors import RlhfError
from engine.progress import ReportProgress
from engine.train.data.prompts import Messages, Prompt, PromptBatch, plain_conversation
from engine.train.distributed.ranks import RankGroup
from engine.train.rollout.conversation import Turns
from engine.train.rollout.rollout import Rollout
from engine.train.user_code.function import UserFunction

Score = float | list[float] | None
"""What a source returns for a response: a number; a number for each turn of the policy, the sum of
which is the response's score; or None if it does not score the response."""


def whole(score: Score) -> float | None:
    """The score of a whole response."""
    return math.fsum(score) if isinstance(score, list) else score


@dataclass(frozen=True)
class RewardInputs:
    """What a reward source receives: B responses of a step."""

    batch: PromptBatch
    ids: list[list[int]]
    """Response token ids, without padding; with an environment, those of its replies, too."""
    texts: list[str]
    """The responses, without special tokens."""
    eos: list[bool]
    """Whether the last token is an end-of-sequence token."""
    step: int
    """0 for samples of the reference before the first step."""
    rows: list[int] | None = None
    """Row indices of these responses in the step's batch; None for all rows."""
    turns: list[Turns] | None = None
    """The turns of each response; None without an environment."""

    @classmethod
    def of(cls, rollout: Rollout, step: int) -> "RewardInputs":
        """All responses of a rollout."""
        if (conversation := rollout.conversation) is not None:
            tokens, lengths, turns = conversation.ids, conversation.lengths, conversation.turns
        else:
            tokens, lengths, turns = rollout.ids, rollout.lengths, None
        ids = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return cls(rollout.batch, ids, rollout.texts, rollout.eos.tolist(), step, turns=turns)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Tensor) -> "RewardInputs":
        """The responses with these row indices, (n,) int64."""
        chosen = rows.tolist()
        return RewardInputs(
            self.batch.select(rows),
            [self.ids[i] for i in chosen],
            [self.texts[i] for i in chosen],
            [self.eos[i] for i in chosen],
            self.step,
            chosen if self.rows is None else [self.rows[i] for i in chosen],
            None if self.turns is None else [self.turns[i] for i in chosen],
        )

    def turn_count(self, index: int) -> int:
        """Number of turns of the policy in a response."""
        return 1 if self.turns is None else self.turns[index].count

    def messages(self, index: int) -> Messages:
        """A response as chat messages, those of its environment included."""
        if self.turns is None:
            return [{"role": "assistant", "content": self.texts[index]}]
        return [dict(message) for message in self.turns[index].messages]

    def plain(self, index: int) -> str:
        """A response as text, without the markup of a chat template between its turns."""
        if self.turns is None or self.batch.prompts[index].messages is None:
            return self.texts[index]
        messages = self.turns[index].messages
        return messages[0]["content"] if len(messages) == 1 else plain_conversation(messages)


class Reward(Protocol):
    """A reward source."""

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """Returns B scores.

        A source of :attr:`RunsOn.RANK_0` may raise any exception. It is retried a few times, then
        the run pauses; once the run resumes, the source is called again. If it raises
        :class:`IncompleteScoresError`, it is called again with only the remaining responses.

        Args:
            inputs: B responses.
            report: call it with (responses done, B).
        """


@runtime_checkable
class AsksEarly(Protocol):
    """A source that can begin to score a response while others are being generated."""

    def ask_early(self, prompt: Prompt, text: str) -> None:
        """Begins to score a response; a later call of the source waits for its score."""


@runtime_checkable
class RunsUserCode(Protocol):
    """A source that calls code of the user's, which can be imported again if its file changed."""

    code: UserFunction


class RunsOn(Enum):
    """Which ranks call a source, and with which responses."""

    EVERY_RANK = "every rank"
    """Each rank calls the source with its share of the responses. For sources that compute on the
    rank's device. All ranks load them, and they must score every response."""
    RANK_0 = "rank 0"
    """Rank 0 calls the source once per step, with all responses. For sources that compare
    responses, keep state or call a service. The other ranks do not load them."""


@dataclass(frozen=True)
class LoadContext:
    """The run that a source is loaded for."""

    config: RewardConfig
    policy_vocabulary: dict[str, int]
    """Token ids by token."""
    ranks: RankGroup
    strategy: str = "ddp"
    """How models are placed on the ranks: `ddp` or `fsdp`."""
    on_host: bool = False
    """Whether frozen models are moved to the device only while they are used."""
    environment: UserFunction | None = None
    """What makes the environments; None without any, and on ranks other than 0."""
    environment_timeout: float = 600.0
    """Seconds that a call of a method of an environment may take."""
    key: str = "reward"
    """The source's configuration key for error messages, such as `eval.rewards[0]`."""


@dataclass(frozen=True)
class SourceKind:
    """How a kind of source is loaded, called and named."""

    runs_on: RunsOn
    load: Callable[[RewardSource, LoadContext], Reward]
    """Called on the ranks of `runs_on`. Raises UserInputError."""
    default_name: Callable[[str], str]
    """Maps the configuration value to the source's name in the metrics, if the user gives none."""
    remote: bool = False
    """Whether other machines compute the scores, so that the source can be called in a thread while
    other sources are called; only with :attr:`RunsOn.RANK_0`."""


WorksAgain = Callable[[], bool]
"""Tests whether a failed source works again. It is called in a thread and may block."""


class IncompleteScoresError(Exception):
    """A source could not score all responses, because a service failed."""

    def __init__(
        self,
        text: str,
        scores: dict[int, Score],
        *,
        retry_after: float,
        works_again: WorksAgain,
    ) -> None:
        super().__init__(text)
        self.scores = scores
        """Scores by response index; missing ones are requested again."""
        self.retry_after = retry_after
        """Seconds to wait at least."""
        self.works_again = works_again


class RewardCallError(RlhfError):
    """A rank-0 source raised in every retry, took too long or returned scores that cannot be used.

    Raised on all ranks.

    The step has not changed anything yet, so it can be repeated from its beginning.
    """

    def __init__(
        self,
        text: str,
        trace: str = "",
        *,
        recovers: bool = False,
        works_again: WorksAgain | None = None,
        retry_after: float = 0.0,
        retry: bool = True,
    ) -> None:
        super().__init__(text)
        self.trace = trace
        """The traceback, for the journal; empty if the text says everything."""
        self.recovers = recovers
        """Whether the run resumes by itself once the source works again."""
        self.works_again = works_again
        """Given on rank 0 if :attr:`recovers`."""
        self.retry_after = retry_after
        """Seconds to wait at least before the source is called again."""
        self.retry = retry
        """Whether another call may succeed."""
