"""Advantage estimators: what the epochs learn from, by `ppo.advantage`.

To add one, declare what the other keys need to know of it in
:data:`engine.config.schema.ADVANTAGES`, write a function from :class:`AdvantageInputs` to
:class:`Targets`, and name it in :data:`ESTIMATORS`.

Shapes: B responses, T response tokens; everything is float32.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.schema import PPOConfig
from engine.train.ppo import masked

BASELINE_DECAY = 0.9
"""Of the mean outcome over earlier steps, for `ppo.baseline: running`."""


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator sees of a step: the whole global batch, the same on every rank."""

    scores: Tensor
    """(B,): as they are trained on, without the KL."""
    old_logprobs: Tensor
    """(B, T): of the policy that sampled."""
    ref_logprobs: Tensor
    """(B, T)."""
    values: Tensor
    """(B, T): V before each token; zeros without a value function."""
    mask: Tensor
    """(B, T) bool."""
    lengths: Tensor
    """(B,) int64."""
    config: PPOConfig
    beta: float
    """The KL coefficient."""
    per_prompt: int
    """Responses to the same prompt lie next to each other, so many at a time."""
    baseline: float | None
    """Mean outcome over earlier steps (`ppo.baseline: running`); None before the first."""

    @property
    def outcomes(self) -> Tensor:
        """(B,): each score less beta times the response's KL to the reference."""
        kl = masked.sequence_kl(self.old_logprobs, self.ref_logprobs, self.mask)
        return self.scores - self.beta * kl


@dataclass(frozen=True)
class Targets:
    """What the epochs learn from; (B, T) each, 0 beyond the length."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    """Both None without a value function."""
    baseline: float | None = None
    """The mean outcome to go on with in the next step; None: no change."""


def make_targets(inputs: AdvantageInputs) -> Targets:
    """The configured estimator's targets, the advantages whitened where `ppo.whiten` says so."""
    targets = ESTIMATORS[inputs.config.advantage](inputs)
    if not inputs.config.whiten:
        return targets
    white = masked.whiten(targets.advantages, inputs.mask)
    return dataclasses.replace(targets, advantages=white)


def gae(inputs: AdvantageInputs) -> Targets:
    """Generalised advantage estimation over token rewards; returns are advantage plus value."""
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
    """The response's outcome less `ppo.baseline`, on each of its tokens."""
    outcomes = inputs.outcomes
    subtracted, after = _baseline(inputs, float(outcomes.mean()))
    advantages = (outcomes - subtracted)[:, None] * inputs.mask
    return Targets(inputs.old_logprobs, advantages, baseline=after)


def _baseline(inputs: AdvantageInputs, mean: float) -> tuple[float, float | None]:
    """What `ppo.baseline` subtracts from this batch's outcomes, and :attr:`Targets.baseline`."""
    before = inputs.baseline
    match inputs.config.baseline:
        case "none":
            return 0.0, None
        case "batch":
            return mean, None
        case "running":
            if before is None:
                return mean, mean
            return before, BASELINE_DECAY * before + (1 - BASELINE_DECAY) * mean


def rloo(inputs: AdvantageInputs) -> Targets:
    """The response's outcome against the others of its prompt, on each of its tokens."""
    outcomes = leave_one_out(inputs.outcomes, inputs.per_prompt)
    return Targets(inputs.old_logprobs, outcomes[:, None] * inputs.mask)


ESTIMATORS: dict[str, Callable[[AdvantageInputs], Targets]] = {
    "gae": gae,
    "reward": reward,
    "rloo": rloo,
}
"""By the names of :data:`engine.config.schema.ADVANTAGES`."""


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, beta: float
) -> Tensor:
    """−β(log π − log π_ref) on every token, plus the score (B,) on the last one; (B, T).

    The last response token carries the score (OpenRLHF `compute_reward`, DeepSpeed-Chat), not the
    padding after it.
    """
    mask = masked.response_mask(lengths, logprobs.shape[1])
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = (lengths - 1)[:, None]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16) backwards over the response; (B, T).

    The value after the last token is 0. A masked token leaves the accumulators as they are, so a
    gap inside a response neither cuts the sum nor counts as a step.
    """
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(carried)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, carried, 0.0)
    return advantages


def leave_one_out(returns: Tensor, per_prompt: int) -> Tensor:
    """RLOO: each return (B,) minus the mean of the others of its prompt.

    Responses to one prompt lie next to each other, `per_prompt` at a time.
    """
    groups = returns.view(-1, per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (per_prompt - 1)
    return (groups - others).view(-1)
