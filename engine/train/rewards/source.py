"""What a reward source is: what it is given, what it returns, and how its kind is declared.

Each kind of source lives in a module of its own, which ends in its :class:`SourceKind`;
:data:`engine.train.rewards.mix.KINDS` lists them by the configuration key that selects them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from engine.config.schema import RewardConfig, RewardSource
from engine.train.data.prompts import PromptBatch
from engine.train.distributed.ranks import RankGroup
from engine.train.rollout.rollout import ReportProgress, Rollout


@dataclass(frozen=True)
class RewardInputs:
    """What a reward sees of a rollout."""

    batch: PromptBatch
    ids: list[list[int]]
    """Response token ids, without padding."""
    texts: list[str]
    eos: list[bool]
    step: int

    @classmethod
    def of(cls, rollout: Rollout, step: int) -> "RewardInputs":
        """The rollout's responses."""
        ids = [
            row[:n] for row, n in zip(rollout.ids.tolist(), rollout.lengths.tolist(), strict=True)
        ]
        return cls(rollout.batch, ids, rollout.texts, rollout.eos.tolist(), step)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Tensor) -> "RewardInputs":
        """Some of them."""
        chosen = rows.tolist()
        return RewardInputs(
            self.batch.select(rows),
            [self.ids[i] for i in chosen],
            [self.texts[i] for i in chosen],
            [self.eos[i] for i in chosen],
            self.step,
        )


class Reward(Protocol):
    """One source of scores."""

    def __call__(self, answers: RewardInputs, report: ReportProgress) -> list[float | None]:
        """A score for each response; None where this source has no opinion.

        A source of :attr:`RunsOn.RANK_0` may raise anything: the run ends with the error, and a
        restart asks it again.
        """


class RunsOn(Enum):
    """Which ranks ask a source, and about which responses."""

    EVERY_RANK = "every rank"
    """Each rank asks about its share of the responses. For sources that compute on the rank's
    device; all ranks load them, and each response must get a score."""
    RANK_0 = "rank 0"
    """Rank 0 asks about all of them, once a step. For sources that compare responses, count their
    calls or reach out to a service; the other ranks do not load them."""


@dataclass(frozen=True)
class LoadContext:
    """What a source is loaded for."""

    config: RewardConfig
    policy_vocabulary: dict[str, int]
    ranks: RankGroup
    strategy: str = "ddp"
    """How models lie on the ranks: `ddp` or `fsdp`."""
    on_host: bool = False
    """Whether frozen models are on the device only while they are used."""


@dataclass(frozen=True)
class SourceKind:
    """How one kind of source is loaded, asked and named."""

    runs_on: RunsOn
    load: Callable[[RewardSource, LoadContext], Reward]
    """Called on the ranks of `runs_on`. Raises UserInputError."""
    default_name: Callable[[str], str]
    """Takes the key's value; names the source in the metrics where the user does not."""


class FunctionError(Exception):
    """A source that rank 0 asks raised; not final, for it may ask a service that will be back."""
