"""Advantage estimators, selected by `ppo.advantage`.

To add an estimator, declare its traits in :data:`engine.config.schema.ADVANTAGES`, write a function
from :class:`AdvantageInputs` to :class:`Targets`, and list it in :data:`ESTIMATORS`.

Shapes: B responses, T response tokens. Tensors are float32 unless their docstring says otherwise.

Sources: Schulman et al. 2016 (GAE); Ziegler et al. 2019, arXiv 1909.08593 (the KL in the reward);
Ahmadian et al. 2024 (RLOO); Huang et al. 2024, arXiv 2403.17031 (implementation details).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.schema import PPOConfig
from engine.train.ppo import masked

BASELINE_DECAY = 0.9
"""Decay of the exponential moving average of outcomes, for `ppo.baseline: running`."""


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator receives: the whole global batch, the same on every rank."""

    scores: Tensor
    """(B,): normalised and clipped, before the KL penalty."""
    old_logprobs: Tensor
    """(B, T): log π_old, of the policy that sampled."""
    ref_logprobs: Tensor
    """(B, T): log π_ref."""
    values: Tensor
    """(B, T): V before each token; zeros without a value function."""
    mask: Tensor
    """(B, T) bool: true on response tokens."""
    lengths: Tensor
    """(B,) int64."""
    config: PPOConfig
    beta: float
    """The KL coefficient."""
    per_prompt: int
    """Number of adjacent rows that respond to the same prompt."""
    baseline: float | None
    """Moving average of earlier outcomes (`ppo.baseline: running`); None at the first step."""

    @property
    def outcomes(self) -> Tensor:
        """(B,): each score minus beta times the response's KL to the reference."""
        kl = masked.sequence_kl(self.old_logprobs, self.ref_logprobs, self.mask)
        return self.scores - self.beta * kl


@dataclass(frozen=True)
class Targets:
    """What the epochs train on; (B, T) each, 0 beyond a response's length."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    """`old_values` and `returns` are None without a value function."""
    baseline: float | None = None
    """The moving average for the next step's :attr:`AdvantageInputs.baseline`; None: unchanged."""


def make_targets(inputs: AdvantageInputs) -> Targets:
    """Runs the configured estimator, then whitens the advantages where `ppo.whiten` is true."""
    targets = ESTIMATORS[inputs.config.advantage](inputs)
    if not inputs.config.whiten:
        return targets
    whitened = masked.whiten(targets.advantages, inputs.mask)
    return dataclasses.replace(targets, advantages=whitened)


def gae(inputs: AdvantageInputs) -> Targets:
    """Generalised advantage estimation over token rewards (Schulman et al. 2016).

    Returns are advantages plus values, before the advantages are whitened.
    """
    config, mask, values = inputs.config, inputs.mask, inputs.values
    rewards = token_rewards(
        inputs.scores, inputs.old_logprobs, inputs.ref_logprobs, inputs.lengths, inputs.beta
    )
    if config.whiten_rewards:
        rewards = masked.whiten(rewards, mask, shift_mean=False)
    advantages = generalised_advantages(rewards, values, mask, config.gamma, config.lam)
    returns = (advantages + values) * mask
    return Targets(inputs.old_logprobs, advantages, values, returns)


def reward(inputs: AdvantageInputs) -> Targets:
    """REINFORCE (Williams 1992): each outcome minus `ppo.baseline`, on each response token."""
    outcomes = inputs.outcomes
    baseline, updated = _baseline(inputs, float(outcomes.mean()))
    advantages = (outcomes - baseline)[:, None] * inputs.mask
    return Targets(inputs.old_logprobs, advantages, baseline=updated)


def _baseline(inputs: AdvantageInputs, mean: float) -> tuple[float, float | None]:
    """The baseline of this batch, and :attr:`Targets.baseline`."""
    previous = inputs.baseline
    match inputs.config.baseline:
        case "none":
            return 0.0, None
        case "batch":
            return mean, None
        case "running":
            if previous is None:
                return mean, mean
            return previous, BASELINE_DECAY * previous + (1 - BASELINE_DECAY) * mean


def rloo(inputs: AdvantageInputs) -> Targets:
    """RLOO (Ahmadian et al. 2024): :func:`leave_one_out` outcomes, on each token."""
    advantages = leave_one_out(inputs.outcomes, inputs.per_prompt)
    return Targets(inputs.old_logprobs, advantages[:, None] * inputs.mask)


ESTIMATORS: dict[str, Callable[[AdvantageInputs], Targets]] = {
    "gae": gae,
    "reward": reward,
    "rloo": rloo,
}
"""Estimators by the names of :data:`engine.config.schema.ADVANTAGES`."""


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, beta: float
) -> Tensor:
    """−β(log π − log π_ref) on every token, plus the score (B,) on the last one; (B, T).

    This is the reward of Ziegler et al. 2019. The score is on the last response token, as in
    OpenRLHF (`compute_reward`) and DeepSpeed-Chat, not on the padding after it.
    """
    mask = masked.response_mask(lengths, logprobs.shape[1])
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = (lengths - 1)[:, None]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16), backwards over the response; (B, T).

    The value after the last token is 0. A token outside the mask leaves the accumulators unchanged,
    so a gap inside a response neither ends the sum nor counts as a time step.
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage)
    for t in reversed(range(rewards.shape[1])):
        on = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(on, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(on, values[:, t], next_value)
        advantages[:, t] = torch.where(on, advantage, 0.0)
    return advantages


def leave_one_out(returns: Tensor, per_prompt: int) -> Tensor:
    """Each return (B,) minus the mean return of the other responses to its prompt.

    The leave-one-out baseline of RLOO (Kool et al. 2019; Ahmadian et al. 2024). Responses to one
    prompt are in `per_prompt` adjacent rows; `per_prompt` is at least 2.
    """
    groups = returns.view(-1, per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (per_prompt - 1)
    return (groups - others).view(-1)
