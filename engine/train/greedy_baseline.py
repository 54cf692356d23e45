"""Scores greedy responses, the baseline of estimators such as ReMax.

Source: Li et al. 2023, arXiv 2310.10505 (ReMax), section 4.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from engine.train.rollout.backend import (
    GREEDY_TEMPERATURE,
    SamplingOptions,
    generate_responses,
)
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run, scores_for_training


def greedy_scores(
    run: Run,
    step: int,
    rollout: Rollout,
    options: SamplingOptions,
    score: Callable[[Rollout], Tensor],
) -> Tensor:
    """Generates and scores the policy's greedy response to each prompt; all ranks must call it.

    Args:
        run: the run, before the step's update.
        step: counted from 1.
        rollout: the step's B responses.
        options: their sampling options.
        score: returns the raw scores of a rollout.

    Returns:
        (B,) float32 on the device: for each response, the score of the greedy response to the same
        prompt, normalised and clipped, with the same penalties.
    """
    greedy_options = dataclasses.replace(options, temperature=GREEDY_TEMPERATURE, per_prompt=1)
    prompts = rollout.batch.prompts[:: options.per_prompt]
    with run.timer.phase(run, step, "generate") as report:
        greedy = generate_responses(
            run.backend, run.policy, prompts, greedy_options, run.tokenizer, run.ranks, report
        )
    scores = scores_for_training(run, score(greedy), greedy, options.max_new_tokens)
    return scores.repeat_interleave(options.per_prompt)
