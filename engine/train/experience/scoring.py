"""Scores responses with the run's reward sources."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.rewards.mix import Scores
from engine.train.rewards.normalise import Normaliser
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.token_states import TokenStates
from engine.train.run import Run


@dataclass(frozen=True)
class ScoredRollout:
    """The responses of a step with their raw scores."""

    rollout: Rollout
    raw: Scores
    training_scores: Tensor
    """(B,) float32: the total with `normalise: group` of sources, if any has it."""
    redrawn: int = 0
    """Number of replacement prompts that were generated, whether kept or not."""


def score_rollout(run: Run, step: int, rollout: Rollout) -> Scores:
    """Returns the raw scores of a step's responses."""
    with run.phase(step, "score") as report:
        return run.rewards(RewardInputs.of(rollout, step), report)


def score_groups(run: Run, step: int, rollout: Rollout) -> ScoredRollout:
    """Scores the responses of whole groups."""
    scores = score_rollout(run, step, rollout)
    training_scores = scores.total
    if run.config.reward.in_groups:
        inputs = RewardInputs.of(rollout, step)
        training_scores = run.rewards.total(
            scores.parts, inputs, per_prompt=run.config.responses_per_prompt
        )
    return ScoredRollout(rollout, scores, training_scores)


def recorded_states(run: Run) -> AbstractContextManager[TokenStates | None]:
    """Context manager that records the reward model's hidden states for the responses it scores.

    Yields None without `model.value: reward_model`.
    """
    return (
        run.rewards.reward_model().recorded_states() if run.config.linear_value else nullcontext()
    )


def scores_for_training(run: Run, raw: Tensor, rollout: Rollout, max_new_tokens: int) -> Tensor:
    """Normalises and clips the raw scores of a rollout, and subtracts penalties.

    Args:
        run: holds the scale of the scores.
        raw: (B,) float32.
        rollout: the B responses.
        max_new_tokens: the token limit of these responses.

    Returns:
        (B,) float32 on the device.
    """
    normalise = Normaliser(run.state.reward_mean, run.state.reward_std)
    return normalise(
        raw.to(run.device), run.config.reward, rollout.ended, rollout.lengths, max_new_tokens
    )


def turn_rewards(run: Run, scored: ScoredRollout) -> Tensor | None:
    """Places the scores of turns on the last token of each turn; (B, T) float32 on the device.

    They have the scale of the scores for training, but not their mean. None if no source scored
    turns.
    """
    if not any(any(rows) for rows in scored.raw.turns.values()):
        return None
    totals = run.rewards.turn_totals(scored.raw, per_prompt=run.config.responses_per_prompt)
    placed = torch.zeros(scored.rollout.ids.shape)
    for row, scores in enumerate(totals):
        if scores:
            last = torch.tensor(scored.rollout.turn_ends(row)) - 1
            placed[row, last] = torch.tensor(scores, dtype=placed.dtype)
    return placed.to(run.device) / run.state.reward_std
