"""What is counted and summed while the policy is updated."""

from dataclasses import dataclass, field

import torch

from engine.train.distributed.ranks import RankGroup


@dataclass
class LossSums:
    """Sums over response tokens, of a minibatch or of all epochs."""

    tokens: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0
    clipped: float = 0.0
    value_clipped: float = 0.0
    squared_log_ratio: float = 0.0
    ratio: float = 0.0
    squared_ratio: float = 0.0

    def add(self, other: "LossSums") -> None:
        """Adds another's sums to these."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def over(self, ranks: RankGroup) -> "LossSums":
        """All ranks' sums together."""
        if ranks.size == 1:
            return self
        numbers = torch.tensor([getattr(self, n) for n in self.__dataclass_fields__]).double()
        return LossSums(*ranks.all_reduce_sum(numbers).tolist())

    @property
    def approx_kl(self) -> float:
        """0.5·mean (log ρ)², to the rollout's policy."""
        return 0.5 * self.squared_log_ratio / self.tokens


@dataclass
class UpdateStats:
    """What happened in the epochs."""

    sums: LossSums = field(default_factory=LossSums)
    first: LossSums | None = None
    """The first minibatch's, before any update: its ratio must be 1."""
    grad_norms: list[float] = field(default_factory=list)
    updates: int = 0
    skipped: int = 0
    nonfinite: int = 0
    """Of the skipped ones, those whose loss or gradient was not finite."""
    stopped_early: bool = False
