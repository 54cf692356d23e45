"""Dynamic sampling: replaces prompts whose responses all have the same score.

Source: Yu et al. 2025, arXiv 2503.14476 (DAPO), section 3.2; `filter_groups` in verl.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.data.randomness import derived_seed
from engine.train.ppo.advantages import constant_groups
from engine.train.rollout.backend import SamplingOptions, generate_responses
from engine.train.rollout.rollout import Rollout, replace_rows
from engine.train.run import Run

Parts = dict[str, list[float | None]]


@dataclass(frozen=True)
class ScoredRollout:
    """The responses of a step with their raw scores."""

    rollout: Rollout
    scores: Tensor
    """(B,) float32."""
    parts: Parts
    """B scores of each reward source, by name."""
    redrawn: int = 0
    """Number of replacement prompts that were generated, whether kept or not."""


def redraw_constant_groups(
    run: Run,
    step: int,
    scored: ScoredRollout,
    options: SamplingOptions,
    score: Callable[[Rollout], tuple[Tensor, Parts]],
) -> ScoredRollout:
    """Replaces prompts whose scores have no variance, in at most `rollout.dynamic_limit` attempts.

    Their group advantages are 0, so they would only shrink the effective batch. Replacements are
    chosen from all prompts by (seed, step, attempt), so that the other steps keep their order.
    Every rank must call it; the result depends on the number of ranks no more than a step's does.

    Args:
        run: the run.
        step: counted from 1.
        scored: the step's first draw.
        options: the sampling options of the first draw.
        score: returns a rollout's raw scores and those of each source.

    Returns:
        The rollout with each replacement in the rows of the prompt it replaces. A prompt that still
        has no variance after the last attempt is kept.
    """
    group, ranks = options.per_prompt, run.ranks
    for attempt in range(1, run.config.rollout.dynamic_limit + 1):
        constant = constant_groups(scored.scores, group).nonzero().squeeze(1)
        wanted = len(constant)
        if not wanted:
            break
        # Each rank needs a prompt; any beyond the wanted number are not used.
        prompts = run.prompts.replacements(step, attempt, max(wanted, ranks.size))
        seed = derived_seed(options.seed, "redraw", attempt)
        with run.timer.phase(run, step, "generate") as report:
            rollout = generate_responses(
                run.backend, run.policy, prompts, dataclasses.replace(options, seed=seed),
                run.tokenizer, ranks, report,
            )  # fmt: skip
        scores, parts = score(rollout)
        useful = (~constant_groups(scores, group)).nonzero().squeeze(1)
        useful = useful[useful < wanted]
        old, new = _rows(constant[: len(useful)], group), _rows(useful, group)
        scored = ScoredRollout(
            replace_rows(scored.rollout, old, rollout, new),
            scored.scores.index_copy(0, old, scores[new]),
            {name: _replaced(scored.parts[name], old, parts[name], new) for name in parts},
            scored.redrawn + wanted,
        )
    return scored


def _rows(groups: Tensor, per_prompt: int) -> Tensor:
    """Returns the row indices of groups: (n,) → (n · per_prompt,)."""
    return (groups[:, None] * per_prompt + torch.arange(per_prompt)).view(-1)


def _replaced(
    into: list[float | None], rows: Tensor, other: list[float | None], other_rows: Tensor
) -> list[float | None]:
    result = list(into)
    for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
        result[row] = other[other_row]
    return result
