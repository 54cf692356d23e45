"""Advantage estimators."""

import torch
from torch import Tensor

from engine.train.ppo.masked import response_mask


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, beta: float
) -> Tensor:
    """−β(log π − log π_ref) on every token, plus the score (B,) on the last one; (B, T).

    The last response token carries the score (OpenRLHF `compute_reward`, DeepSpeed-Chat), not the
    padding after it.
    """
    mask = response_mask(lengths, logprobs.shape[1])
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

    Answers to one prompt lie next to each other, `per_prompt` at a time.
    """
    groups = returns.view(-1, per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (per_prompt - 1)
    return (groups - others).view(-1)
