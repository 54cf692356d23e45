"""What a reward source is given and what it returns."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.train.data.prompts import PromptBatch
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
        """The rollout's answers."""
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
        """A score for each answer; None where this source has no opinion."""
