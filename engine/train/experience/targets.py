"""Advantages and returns of a step, and the values that some of them need."""

import dataclasses
import math

from engine.train.experience.experience import Experience
from engine.train.experience.model_outputs import ModelOutputs
from engine.train.ppo.advantages import AdvantageInputs, Targets, make_targets
from engine.train.ppo.entropy import with_covariance
from engine.train.ppo.linear_value import fit_linear_value
from engine.train.ppo.rollout_correction import with_rollout_correction
from engine.train.rollout.token_states import TokenStates
from engine.train.run import Run


def training_targets(
    run: Run,
    step: int,
    experience: Experience,
    outputs: ModelOutputs,
) -> Targets:
    """Computes the advantages and returns that the epochs train on.

    Updates the running baseline. Fits the values first with `model.value: reward_model`.

    Args:
        run: the run.
        step: from 1.
        experience: B responses of at most T tokens.
        outputs: of the models for these.
    """
    config, state, rollout = run.config, run.state, experience.rollout
    inputs = AdvantageInputs(
        scores=experience.training_scores,
        old_logprobs=outputs.old_logprobs, ref_logprobs=outputs.ref_logprobs,
        values=outputs.old_values, squared_probs=outputs.squared_probs,
        mask=rollout.mask, lengths=rollout.lengths, config=config.ppo,
        beta=config.kl.beta if config.kl.place == "reward" else 0.0,
        per_prompt=config.responses_per_prompt, baseline=state.baseline,
        kl_estimator=config.kl.estimator, greedy_scores=experience.greedy_scores,
        ended=rollout.ended, entropies=rollout.entropies, turn_rewards=experience.turn_rewards,
    )  # fmt: skip
    if experience.states is not None:
        inputs = with_fitted_values(run, step, experience.states, inputs)
    targets = with_covariance(
        make_targets(inputs), rollout.mask, config.ppo, seed=state.sampling_seed, step=step
    )
    targets = with_rollout_correction(targets, rollout, config.ppo)
    # Once the moving average is not finite, it would never recover.
    if targets.baseline is not None and math.isfinite(targets.baseline):
        state.baseline = targets.baseline
    return targets


def with_fitted_values(
    run: Run, step: int, states: TokenStates, inputs: AdvantageInputs
) -> AdvantageInputs:
    """Fits the value function of `model.value: reward_model` and adds its values to the inputs.

    Discards weights that are not finite. Clears `states`, which are large, to free memory before
    the policy is updated.
    """
    state = run.state
    with run.phase(step, "fit"):
        fit = fit_linear_value(
            state.value_weights, states, inputs, run.ranks, state.value_positions
        )
    if all(map(math.isfinite, fit.weights)):
        state.value_weights = fit.weights
    states.clear()
    return dataclasses.replace(inputs, values=fit.values)
