"""One PPO step, from prompts to metrics."""

import dataclasses
import math
import time

import msgspec
from torch import Tensor

from engine.config.schema import RunConfig
from engine.progress import ReportProgress, report_nothing
from engine.protocol.rank_messages import Sample
from engine.train.experience.experience import Experience, collect_experience
from engine.train.experience.rollout_check import check_rollout
from engine.train.ppo import masked
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.advantages import AdvantageInputs, Targets, make_targets
from engine.train.ppo.entropy import adapt, with_covariance, with_weight
from engine.train.ppo.forward import MicroBatchLimit, longest_first, score_tokens
from engine.train.ppo.linear_value import fit_linear_value
from engine.train.ppo.metrics import group_metrics, speed_metrics, step_metrics
from engine.train.ppo.optimise import optimise
from engine.train.ppo.rollout_correction import with_rollout_correction
from engine.train.reports.samples import kept_samples
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.token_states import TokenStates
from engine.train.run import Run


def train_step(
    run: Run, step: int, recorded: Rollout | None = None
) -> tuple[dict[str, float], list[Sample]]:
    """Runs one PPO step: generate, score, compare with the reference, update the policy.

    Updates the policy, the optimiser and the running values of `run.state`. All ranks must call it.
    They share the forward and backward passes; everything in between, tensors of at most (B, T), is
    computed on every rank from the whole global batch.

    Args:
        run: the run.
        step: counted from 1. With the seed, it determines every random choice.
        recorded: a rollout to train on instead of generating one; used to compare runs.

    Returns:
        The step's metrics by name, and the samples to log (empty on ranks other than 0).
    """
    config, state, ranks = run.config, run.state, run.ranks
    started = time.perf_counter()
    run.times.seconds.clear()

    # 1. Generate responses and score them.
    experience = collect_experience(run, step, recorded)
    rollout = experience.rollout

    # 2. Log-probabilities of the reference and of the policy before the update.
    rows = ranks.strided_share(longest_first(rollout, rollout.rows))
    with run.phase(step, "reference") as report:
        ref_logprobs, _ = score_tokens(
            run.reference, rollout, config.rollout.temperature, MicroBatchLimit.of(config, rollout),
            rows=rows, want="logits", report=report,
        )  # fmt: skip
        old_logprobs, old_values = old_policy_outputs(run, rollout, rows, report)
        squared_probs: Tensor | None = None
        if config.ppo.traits.squared_probs:
            squared_probs = squared_probabilities(run, rollout, old_logprobs, rows, report)
    ref_logprobs = ranks.all_reduce_sum(ref_logprobs)
    if recorded is None:
        check_rollout(run, step, rollout, old_logprobs, ref_logprobs)

    # 3. Advantages and returns, from the whole global batch.
    targets = training_targets(
        run, step, experience, old_logprobs, ref_logprobs, old_values, squared_probs
    )

    # 4. Epochs of clipped updates.
    if config.ppo.entropy_target is not None:
        config = with_adapted_entropy_bonus(run, rollout)
    with run.phase(step, "optimise") as report:
        stats = optimise(
            ranks, run.learner, run.optimiser, rollout, targets, config,
            seed=state.sampling_seed, step=step, report=report,
        )  # fmt: skip
    if run.average is not None:
        run.average.update(run.policy)

    # 5. Metrics and samples.
    state.episodes += len(experience.scores)
    metrics = step_metrics(rollout, experience.scores, ref_logprobs, targets, stats, config)
    metrics |= {"episode": float(state.episodes), "lr": learning_rate(config.train, step)}
    metrics |= group_metrics(
        experience.scores, experience.training_scores, config.responses_per_prompt
    )
    metrics |= experience.metrics(step)
    run.gather_times()
    metrics |= speed_metrics(run.times.ranks, rollout, time.perf_counter() - started)
    if not ranks.is_lead:  # only rank 0 reports samples
        return metrics, []
    return metrics, kept_samples(
        config.log, run.tokenizer, rollout, experience.scores, experience.parts, targets,
        ref_logprobs,
    )  # fmt: skip


def old_policy_outputs(
    run: Run,
    rollout: Rollout,
    rows: Tensor,
    report: ReportProgress = report_nothing,
) -> tuple[Tensor, Tensor]:
    """Computes log π_old and V_old of a rollout with the policy before its update.

    In float32, the log-probabilities recorded by a native rollout are reused: they match a full
    forward pass up to rounding. In bfloat16 they do not, and those of another engine never match
    closely enough, so they are recomputed by the same forward pass as in training. A separate value
    trunk does not run during generation, so its values are always computed here.

    Args:
        run: the run.
        rollout: B responses of at most T tokens.
        rows: the rows that this rank computes; (n,) int64.
        report: called with (rows done, rows).

    Returns:
        log π_old and V_old, each (B, T) float32 and 0 beyond a response's length. V_old is 0 if the
        policy has no value function.
    """
    limit, temperature = MicroBatchLimit.of(run.config, rollout), run.config.rollout.temperature
    logprobs, values = rollout.logprobs * rollout.mask, rollout.values * rollout.mask
    if run.config.model.dtype != "float32" or run.backend.separate:
        logprobs, values = score_tokens(
            run.policy, rollout, temperature, limit, rows=rows, report=report
        )
        logprobs, values = run.ranks.all_reduce_sum(logprobs), run.ranks.all_reduce_sum(values)
    elif run.policy.value_trunk is not None:
        _, values = score_tokens(
            run.policy, rollout, temperature, limit, rows=rows, want="values", report=report
        )
        values = run.ranks.all_reduce_sum(values)
    return logprobs, values


def squared_probabilities(
    run: Run,
    rollout: Rollout,
    old_logprobs: Tensor,
    rows: Tensor,
    report: ReportProgress = report_nothing,
) -> Tensor:
    """Computes Σ π_old² over the vocabulary at each token of a rollout; (B, T) float32.

    With log π_τ(y) = z_y/τ − log Σ exp(z/τ), Σ π_τ² = exp(2·log π_τ(y) − log π_(τ/2)(y)) for any
    token y. So a pass at half of the temperature is enough.

    Args:
        run: the run, before the step's update.
        rollout: B responses of at most T tokens.
        old_logprobs: (B, T), by the same policy at the rollout's temperature.
        rows: the rows that this rank computes; (n,) int64.
        report: called with (rows done, rows).
    """
    limit, temperature = MicroBatchLimit.of(run.config, rollout), run.config.rollout.temperature / 2
    colder, _ = score_tokens(
        run.policy, rollout, temperature, limit, rows=rows, want="logits", report=report
    )
    colder = run.ranks.all_reduce_sum(colder)
    # Rounding must not make it larger than 1, or smaller than the sampled token's part of it.
    squared = old_logprobs.exp() ** 2
    return (2 * old_logprobs - colder).exp().clamp(max=1.0).maximum(squared) * rollout.mask


def with_adapted_entropy_bonus(run: Run, rollout: Rollout) -> RunConfig:
    """Adapts the weight of the entropy bonus to the policy's entropy before its update.

    Returns:
        The configuration in force, with that weight.
    """
    entropy = float(masked.masked_mean(rollout.entropies, rollout.mask))
    run.state.entropy_bonus = adapt(run.state.entropy_bonus, entropy, run.config.ppo)
    ppo = with_weight(run.config.ppo, run.state.entropy_bonus, entropy)
    return msgspec.structs.replace(run.config, ppo=ppo)


def training_targets(
    run: Run,
    step: int,
    experience: Experience,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    old_values: Tensor,
    squared_probs: Tensor | None = None,
) -> Targets:
    """Computes the advantages and returns that the epochs train on.

    Updates the running baseline. Fits the values first with `model.value: reward_model`.

    Args:
        run: the run.
        step: from 1.
        experience: B responses of at most T tokens.
        old_logprobs: (B, T) float32, by the policy before its update.
        ref_logprobs: (B, T) float32.
        old_values: (B, T) float32.
        squared_probs: (B, T) float32, for estimators that need them.
    """
    config, state, rollout = run.config, run.state, experience.rollout
    inputs = AdvantageInputs(
        scores=experience.training_scores, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        values=old_values, mask=rollout.mask, lengths=rollout.lengths, config=config.ppo,
        beta=config.kl.beta if config.kl.place == "reward" else 0.0,
        per_prompt=config.responses_per_prompt, baseline=state.baseline,
        kl_estimator=config.kl.estimator, greedy_scores=experience.greedy_scores,
        ended=rollout.ended, entropies=rollout.entropies, squared_probs=squared_probs,
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
