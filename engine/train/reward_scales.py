"""Scales for normalising scores: measured before the first step and kept in checkpoints."""

import logging
import re
from collections.abc import Callable

import torch

from engine.config.schema import RunConfig
from engine.config.sections.reward import RewardConfig
from engine.errors import RewardError
from engine.train.checkpoints.folder import TrainingState
from engine.train.experience.respond import respond
from engine.train.ppo.linear_value import with_all_features
from engine.train.rewards.normalise import Normaliser
from engine.train.rewards.source import RewardInputs
from engine.train.rewards.value_init import first_weights, scale_value_head
from engine.train.rollout.backend import SamplingOptions
from engine.train.run import Run

log = logging.getLogger("engine")

URL_WITH_QUERY = re.compile(r"(://[^\s?]*)\?\S*")
"""Matches a URL with a query, from after its scheme on; group 1 excludes the query."""


def use_saved_scales(run: Run, changed: Callable[[str], None]) -> None:
    """Applies the checkpoint's scales to the reward sources, and drops those no longer needed.

    Args:
        run: as it was loaded.
        changed: called with a sentence if the reward differs from the one used before.
    """
    state, rewards = run.state, run.rewards
    _adopt_reward(state, run.config.reward, changed)
    if run.config.reward.normalise == "none":
        state.reward_mean, state.reward_std = 0.0, 1.0
    scales = state.reward_scales
    state.reward_scales = {name: scales[name] for name in rewards.normalised if name in scales}
    rewards.scales = state.reward_scales


def fit_scales(run: Run, config: RunConfig) -> None:
    """Measures the scales of the scores, and scales a value function that starts from the reward.

    A resumed run has them in its checkpoint, unless a `normalise` was turned on since. In that case
    all are measured on the current reference, which is the initial one unless it is updated.

    Args:
        run: the run; its state and reward mix receive the scales, and its value head is scaled.
        config: the configuration that the run was loaded with; the current one may already differ.

    Raises:
        RewardCallError: a reward function raised; on all ranks.
    """
    state, rewards = run.state, run.rewards
    unscaled = (state.reward_mean, state.reward_std) == (0.0, 1.0)
    if (config.reward.normalise == "reference" and unscaled) or any(
        name not in rewards.scales for name in rewards.normalised
    ):
        run.announce(state.step, "normalise reward")
        _normalise_rewards(run, config)
        state.value_weights = []  # they belong to other scores
    total = Normaliser(state.reward_mean, state.reward_std)
    if config.ppo.value_init == "reward_model" and not state.step:
        scale_value_head(run.policy, rewards, total)
    if config.linear_value:
        first = first_weights(rewards, total)
        weights = state.value_weights or first
        if len(weights) == len(first):  # also from a version without the other features
            weights = with_all_features(weights)
            state.value_positions = config.rollout.max_new_tokens
        state.value_weights = weights


def reference_responses(run: Run, config: RunConfig) -> RewardInputs:
    """Generates responses of the reference to the run's first prompts, to normalise scores with.

    There are `reward.normalise_samples` of them.
    """
    count = config.reward.normalise_samples
    prompts = run.prompts.in_steps_of(count).for_step(1)
    options = SamplingOptions(
        seed=config.seed,
        step=0,
        weights_version=0,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    rollout = respond(run, run.reference, prompts, options, purpose="reward.normalise")
    return RewardInputs.of(rollout, 0)


def _adopt_reward(
    state: TrainingState, config: RewardConfig, changed: Callable[[str], None]
) -> None:
    """Drops scales that belong to another reward, so that they are measured again."""
    reward = config.scored_by
    # Earlier versions kept a URL's query, which may contain a secret key.
    before = URL_WITH_QUERY.sub(r"\1", state.scored_by)
    if before not in ("", reward):
        text = (
            f"from step {state.step + 1} on scores come from {reward}, before from "
            f"{before}: they are not comparable, and kl.beta may need another value"
        )
        log.info(text)
        changed(text)
        state.reward_mean, state.reward_std, state.baseline = 0.0, 1.0, None
        state.reward_scales, state.value_weights = {}, []
    state.scored_by = reward


def _normalise_rewards(run: Run, config: RunConfig) -> None:
    """Measures means and standard deviations on reference responses; stores them in the state."""
    state, rewards = run.state, run.rewards
    inputs = reference_responses(run, config)
    scores = rewards(inputs)
    total = scores.total
    if rewards.normalised:
        for name in rewards.normalised:
            key = f"reward.mix[{rewards.names.index(name)}].normalise"
            given = [s for s in scores.parts[name] if s is not None]
            if not given:
                raise RewardError(
                    f"{key}: reference needs scores, but '{name}' scored no response of the "
                    f"reference: use {key}: none"
                )
            scale = Normaliser.of(torch.tensor(given), key)
            rewards.scales[name] = (scale.mean, scale.std)
        total = rewards.total(scores.parts, inputs)
    if config.reward.normalise == "reference":
        normaliser = Normaliser.of(total)
        state.reward_mean, state.reward_std = normaliser.mean, normaliser.std
