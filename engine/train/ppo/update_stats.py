"""Sums and counters of a step's policy updates."""

from dataclasses import dataclass, field


@dataclass
class LossSums:
    """Sums over the response tokens of a minibatch, or of all updates of a step.

    The loss terms are those of :mod:`engine.train.ppo.losses`; `tokens` is the denominator of their
    means.
    """

    tokens: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0
    clipped_high: float = 0.0
    clipped_low: float = 0.0
    dual_clipped: float = 0.0
    off_policy: float = 0.0
    """Number of tokens left out by `ppo.off_policy_mask`."""
    entropy: float = 0.0
    """Entropy, weighted like the loss; 0 without `ppo.entropy_coef`."""
    kl: float = 0.0
    """KL penalty in the loss, weighted like the loss, before beta; 0 unless `kl.place: loss`."""
    router_loss: float = 0.0
    """Load-balancing loss of experts, before its coefficient; 0 without `ppo.router_coef`."""
    value_clipped: float = 0.0
    squared_log_ratio: float = 0.0
    ratio: float = 0.0
    squared_ratio: float = 0.0

    def add(self, other: "LossSums") -> None:
        """Adds `other` to these sums, in place."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def clipped(self) -> float:
        """Number of tokens whose policy loss is the clipped term."""
        return self.clipped_high + self.clipped_low

    @property
    def approx_kl(self) -> float:
        """0.5·mean (log ρ)² between the policy and the sampling policy, in nats (as in TRL)."""
        return 0.5 * self.squared_log_ratio / self.tokens


@dataclass
class UpdateStats:
    """What the epochs of a step did."""

    sums: LossSums = field(default_factory=LossSums)
    """Over the minibatches that led to an update."""
    grad_norms: list[float] = field(default_factory=list)
    """Gradient norm of each update, before clipping."""
    updates: int = 0
    skipped: int = 0
    """Minibatches without an update."""
    nonfinite: int = 0
    """Skipped minibatches whose loss or gradient was not finite."""
