"""Collects what a step trains on: the policy's responses and their scores."""

from dataclasses import dataclass

from torch import Tensor

from engine.metrics import VERSION_LAG
from engine.train.experience.dynamic_sampling import redraw_groups
from engine.train.experience.generation import begin_next_rollout, obtain_rollout
from engine.train.experience.greedy_baseline import greedy_scores
from engine.train.experience.rollout_check import version_lag
from engine.train.experience.scoring import (
    recorded_states,
    score_groups,
    scores_for_training,
    turn_rewards,
)
from engine.train.ppo.metrics import conversation_metrics, group_metrics, source_metrics
from engine.train.rewards.mix import Scores
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.token_states import TokenStates
from engine.train.run import Run


@dataclass(frozen=True)
class Experience:
    """The responses of a step and their scores; the same on every rank, but for `states`."""

    rollout: Rollout
    """B responses."""
    scores: Tensor
    """(B,) float32 on the device: normalised and clipped, minus penalties."""
    training_scores: Tensor
    """The same with `normalise: group` of sources, for the advantages; the metrics and the samples
    show :attr:`scores`, because the mean of the others is always 0, less penalties."""
    raw: Scores
    """As the reward sources gave them."""
    turn_rewards: Tensor | None
    """(B, T) float32 on the device: see :func:`turn_rewards`."""
    redrawn: int | None
    """Number of prompts that were drawn as replacements; None without `rollout.dynamic`."""
    greedy_scores: Tensor | None
    """(B,): see :func:`greedy_scores`; None for estimators without that baseline."""
    states: TokenStates | None
    """Hidden states of the reward model; None without `model.value: reward_model`."""

    def metrics(self, step: int, per_prompt: int) -> dict[str, float]:
        """Metrics of scores by source and group, of the rollout's age, turns and additions."""
        metrics = source_metrics(self.raw.parts)
        metrics |= group_metrics(self.scores, self.training_scores, per_prompt)
        metrics[VERSION_LAG] = float(version_lag(self.rollout, step))
        if (conversation := self.rollout.conversation) is not None:
            metrics |= conversation_metrics(conversation, self.rollout)
        if self.greedy_scores is not None:
            metrics["objective/greedy_scores"] = float(self.greedy_scores.mean())
        if self.redrawn is not None:
            metrics["val/redrawn_prompts"] = float(self.redrawn)
        return metrics


def collect_experience(run: Run, step: int, recorded: Rollout | None) -> Experience:
    """Generates and scores a step's responses; all ranks must call it.

    Also begins to generate the next step's responses if configured (`rollout.ahead`).

    Args:
        run: the run.
        step: from 1.
        recorded: a rollout to score instead of generating one. Its prompts are not redrawn.
    """
    config, generated = run.config, recorded is None
    rollout = recorded or obtain_rollout(run, step)
    # The engine generates one batch at a time, so those that depend on this step's come first.
    generates_again = config.rollout.dynamic or config.ppo.traits.greedy_baseline
    if generated and not generates_again:
        begin_next_rollout(run, step)
    with recorded_states(run) as states:
        scored = score_groups(run, step, rollout)
    if generated and config.rollout.dynamic:
        scored = redraw_groups(run, step, scored)
    greedy: Tensor | None = None
    if config.ppo.traits.greedy_baseline:
        greedy = greedy_scores(run, step, scored.rollout)
    if generated and generates_again:
        begin_next_rollout(run, step)
    limit = config.rollout.max_new_tokens
    return Experience(
        rollout=scored.rollout,
        scores=scores_for_training(run, scored.raw.total, scored.rollout, limit),
        training_scores=scores_for_training(run, scored.training_scores, scored.rollout, limit),
        raw=scored.raw,
        turn_rewards=turn_rewards(run, scored),
        redrawn=scored.redrawn if config.rollout.dynamic else None,
        greedy_scores=greedy,
        states=states,
    )
