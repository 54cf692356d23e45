"""Dynamic sampling: replaces prompts that teach nothing, or that are too hard or too easy.

Source: Yu et al. 2025, arXiv 2503.14476 (DAPO), section 3.2; `filter_groups` in verl and
`dynamic_filtering_range` in OpenRLHF.
"""

import dataclasses

import torch
from torch import Tensor

from engine.config.sections.rollout import RolloutConfig
from engine.train.data.randomness import derived_seed
from engine.train.experience.generation import generate, sampling_options
from engine.train.experience.scoring import ScoredRollout, score_groups
from engine.train.ppo.advantages import constant_groups
from engine.train.rollout.rollout import replace_rows
from engine.train.run import Run


def redraw_groups(run: Run, step: int, scored: ScoredRollout) -> ScoredRollout:
    """Replaces :func:`unwanted_groups`, in at most `rollout.dynamic_limit` attempts.

    Replacements are chosen from all prompts by (seed, step, attempt), so that the other steps keep
    their order. Every rank must call it; the result depends on the number of ranks no more than a
    step's does.

    Args:
        run: the run.
        step: counted from 1.
        scored: the step's first draw.

    Returns:
        The rollout with each replacement in the rows of the prompt it replaces. A prompt that is
        still unwanted after the last attempt is kept.
    """
    options = sampling_options(run, step)
    group = options.per_prompt
    for attempt in range(1, run.config.rollout.dynamic_limit + 1):
        unwanted = unwanted_groups(scored, group, run.config.rollout).nonzero().squeeze(1)
        wanted = len(unwanted)
        if not wanted:
            break
        # Each rank needs a prompt; any beyond the wanted number are not used.
        prompts = run.prompts.replacements(step, attempt, max(wanted, run.ranks.size))
        seed = derived_seed(options.seed, "redraw", attempt)
        rollout = generate(run, step, prompts, dataclasses.replace(options, seed=seed))
        other = score_groups(run, step, rollout)
        useful = (~unwanted_groups(other, group, run.config.rollout)).nonzero().squeeze(1)
        useful = useful[useful < wanted]
        old, new = _rows(unwanted[: len(useful)], group), _rows(useful, group)
        scored = ScoredRollout(
            replace_rows(scored.rollout, old, rollout, new),
            scored.raw.replaced(old, other.raw, new),
            scored.training_scores.index_copy(0, old, other.training_scores[new]),
            scored.redrawn + wanted,
        )
    return scored


def unwanted_groups(scored: ScoredRollout, per_prompt: int, config: RolloutConfig) -> Tensor:
    """Finds the prompts to be replaced; (groups,) bool.

    Those whose scores have no variance: their group advantages are 0, so they would only shrink the
    effective batch. With `rollout.dynamic_range`, also those whose mean raw score is not between
    its numbers.
    """
    unwanted = constant_groups(scored.training_scores, per_prompt)
    if config.dynamic_range is None:
        return unwanted
    low, high = config.dynamic_range
    means = scored.raw.total.double().view(-1, per_prompt).mean(1)
    return unwanted | (means <= low) | (means >= high)


def _rows(groups: Tensor, per_prompt: int) -> Tensor:
    """Returns the row indices of groups: (n,) → (n · per_prompt,)."""
    return (groups[:, None] * per_prompt + torch.arange(per_prompt)).view(-1)
