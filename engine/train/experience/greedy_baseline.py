"""Scores greedy responses, the baseline of estimators such as ReMax.

Source: Li et al. 2023, arXiv 2310.10505 (ReMax), section 4.
"""

import dataclasses

from torch import Tensor

from engine.train.experience.generation import generate, sampling_options
from engine.train.experience.scoring import score_rollout, scores_for_training
from engine.train.rollout.backend import GREEDY_TEMPERATURE
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run


def greedy_scores(run: Run, step: int, rollout: Rollout) -> Tensor:
    """Generates and scores the policy's greedy response to each prompt; all ranks must call it.

    Args:
        run: the run, before the step's update.
        step: counted from 1.
        rollout: the step's B responses.

    Returns:
        (B,) float32 on the device: for each response, the score of the greedy response to the same
        prompt, normalised and clipped, with the same penalties.
    """
    greedy = greedy_rollout(run, step, rollout)
    raw = score_rollout(run, step, greedy)
    scores = scores_for_training(run, raw.total, greedy, run.config.rollout.max_new_tokens)
    return scores.repeat_interleave(run.config.responses_per_prompt)


def greedy_rollout(run: Run, step: int, rollout: Rollout) -> Rollout:
    """Generates the policy's greedy response to each prompt of a rollout."""
    options = dataclasses.replace(
        sampling_options(run, step), temperature=GREEDY_TEMPERATURE, per_prompt=1
    )
    prompts = rollout.batch.prompts[:: run.config.responses_per_prompt]
    return generate(run, step, prompts, options)
