"""One PPO step, from prompts to metrics."""

import dataclasses
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from engine.metrics import VERSION_LAG
from engine.progress import ReportProgress, report_nothing
from engine.protocol.rank_messages import Sample
from engine.train.dynamic_sampling import Parts, ScoredRollout, redraw_constant_groups
from engine.train.greedy_baseline import greedy_scores
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.ppo.forward import longest_first, score_tokens
from engine.train.ppo.linear_value import fit_linear_value
from engine.train.ppo.metrics import source_metrics, speed_metrics, step_metrics
from engine.train.ppo.optimise import optimise
from engine.train.ppo.rollout_correction import with_rollout_correction
from engine.train.reports.samples import kept_samples
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.backend import SamplingOptions, generate_responses
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.token_states import TokenStates
from engine.train.rollout_check import check_rollout, version_lag
from engine.train.run import Run, scores_for_training


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
    config, state, ranks, timer = run.config, run.state, run.ranks, run.timer
    started = time.perf_counter()
    timer.seconds.clear()

    # 1. Generate responses to the step's prompts, and begin generating the next step's.
    rollout = recorded or obtain_rollout(run, step)
    generates_again = config.rollout.dynamic or config.ppo.traits.greedy_baseline
    if recorded is None and not generates_again:
        begin_next_rollout(run, step)

    # 2. Score them, and redraw prompts whose scores do not vary.
    with recorded_states(run) as states:
        scored = ScoredRollout(rollout, *score_rollout(run, step, rollout))
    if config.rollout.dynamic and recorded is None:
        scored = redraw_constant_groups(
            run, step, scored, sampling_options(run, step), partial(score_rollout, run, step)
        )
        rollout = scored.rollout
    scores = scores_for_training(run, scored.scores, rollout, config.rollout.max_new_tokens)
    greedy: Tensor | None = None
    if config.ppo.traits.greedy_baseline:
        greedy = greedy_scores(
            run, step, rollout, sampling_options(run, step),
            lambda responses: score_rollout(run, step, responses)[0],
        )  # fmt: skip
    if recorded is None and generates_again:  # the engine generates one batch at a time
        begin_next_rollout(run, step)

    # 3. Log-probabilities of the reference and of the policy before the update.
    rows = ranks.strided_share(longest_first(rollout, rollout.rows))
    with timer.phase(run, step, "reference") as report:
        ref_logprobs, _ = score_tokens(
            run.reference, rollout, config.rollout.temperature, config.ppo.micro_batch_size,
            rows=rows, want="logits", report=report,
        )  # fmt: skip
        old_logprobs, old_values = old_policy_outputs(run, rollout, rows, report)
    ref_logprobs = ranks.all_reduce_sum(ref_logprobs)
    if recorded is None:
        check_rollout(run, step, rollout, old_logprobs, ref_logprobs)

    # 4. Advantages and returns, from the whole global batch.
    inputs = AdvantageInputs(
        scores=scores, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        values=old_values, mask=rollout.mask, lengths=rollout.lengths, config=config.ppo,
        beta=config.kl.beta if config.kl.place == "reward" else 0.0,
        per_prompt=config.responses_per_prompt, baseline=state.baseline,
        kl_estimator=config.kl.estimator, greedy_scores=greedy, ended=rollout.ended,
        entropies=rollout.entropies,
    )  # fmt: skip
    if states is not None:
        inputs = with_fitted_values(run, step, states, inputs)
    targets = make_targets(inputs)
    targets = with_rollout_correction(targets, rollout, config.ppo)
    # Once the moving average is not finite, it would never recover.
    if targets.baseline is not None and math.isfinite(targets.baseline):
        state.baseline = targets.baseline

    # 5. Epochs of clipped updates.
    with timer.phase(run, step, "optimise") as report:
        stats = optimise(
            ranks, run.learner, run.optimiser, rollout, targets, config,
            seed=state.sampling_seed, step=step, report=report,
        )  # fmt: skip
    if run.average is not None:
        run.average.update(run.policy)

    # 6. Metrics and samples.
    state.episodes += len(scores)
    metrics = step_metrics(rollout, scores, ref_logprobs, targets, stats, config)
    metrics |= {"episode": float(state.episodes), "lr": learning_rate(config.train, step)}
    metrics |= source_metrics(scored.parts) | {VERSION_LAG: float(version_lag(rollout, step))}
    if greedy is not None:
        metrics["objective/greedy_scores"] = float(greedy.mean())
    if config.rollout.dynamic:
        metrics["val/redrawn_prompts"] = float(scored.redrawn)
    timer.gather(run)
    metrics |= speed_metrics(timer.ranks, rollout, time.perf_counter() - started)
    if not ranks.is_lead:  # only rank 0 reports samples
        return metrics, []
    return metrics, kept_samples(
        config.log, run.tokenizer, rollout, scores, scored.parts, targets, ref_logprobs
    )


def obtain_rollout(run: Run, step: int) -> Rollout:
    """Returns the rollout of a step, generated ahead or now."""
    if run.ahead is not None:
        with run.timer.phase(run, step, "generate") as report:
            rollout = run.ahead.take(sampling_options(run, step), report)
        if rollout is not None:
            return rollout
    if run.backend.separate:
        with run.timer.phase(run, step, "sync") as report:
            run.backend.sync(run.policy, step - 1, report)
    with run.timer.phase(run, step, "generate") as report:
        return generate_rollout(run, step, report)


def begin_next_rollout(run: Run, step: int) -> None:
    """Starts generating the next step's responses during the rest of this step (`rollout.ahead`).

    Does nothing after the last step, or if a checkpoint follows this step: responses after a
    checkpoint are generated with its weights, so that a run resumed from it trains on the same
    responses as the run that saved it.
    """
    train = run.config.train
    if run.ahead is None or step >= train.steps or train.saves_after(step):
        return
    options = dataclasses.replace(sampling_options(run, step + 1), weights_version=step - 1)
    with run.timer.phase(run, step, "sync") as report:
        run.ahead.begin(run.prompts.for_step(step + 1), options, report)


def generate_rollout(run: Run, step: int, report: ReportProgress) -> Rollout:
    """Generates the policy's responses to the prompts of a step, on every rank."""
    prompts, options = run.prompts.for_step(step), sampling_options(run, step)
    return generate_responses(
        run.backend, run.policy, prompts, options, run.tokenizer, run.ranks, report
    )


def sampling_options(run: Run, step: int) -> SamplingOptions:
    """Returns the sampling options of a step."""
    rollout = run.config.rollout
    return SamplingOptions(
        seed=run.state.sampling_seed,
        step=step,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        weights_version=step - 1,
        per_prompt=run.config.responses_per_prompt,
    )


def recorded_states(run: Run) -> AbstractContextManager[TokenStates | None]:
    """Context manager that records the reward model's hidden states for the responses it scores.

    Yields None without `model.value: reward_model`.
    """
    return (
        run.rewards.reward_model().recorded_states() if run.config.linear_value else nullcontext()
    )


def score_rollout(run: Run, step: int, rollout: Rollout) -> tuple[Tensor, Parts]:
    """Returns the raw scores of a step's responses, (B,) float32, and each source's scores."""
    with run.timer.phase(run, step, "score") as report:
        return run.rewards(RewardInputs.of(rollout, step), report)


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
    size, temperature = run.config.ppo.micro_batch_size, run.config.rollout.temperature
    logprobs, values = rollout.logprobs * rollout.mask, rollout.values * rollout.mask
    if run.config.model.dtype != "float32" or run.backend.separate:
        logprobs, values = score_tokens(
            run.policy, rollout, temperature, size, rows=rows, report=report
        )
        logprobs, values = run.ranks.all_reduce_sum(logprobs), run.ranks.all_reduce_sum(values)
    elif run.policy.value_trunk is not None:
        _, values = score_tokens(
            run.policy, rollout, temperature, size, rows=rows, want="values", report=report
        )
        values = run.ranks.all_reduce_sum(values)
    return logprobs, values


def with_fitted_values(
    run: Run, step: int, states: TokenStates, inputs: AdvantageInputs
) -> AdvantageInputs:
    """Fits the value function of `model.value: reward_model` and adds its values to the inputs.

    Discards weights that are not finite. Clears `states`, which are large, to free memory before
    the policy is updated.
    """
    state = run.state
    with run.timer.phase(run, step, "fit"):
        fit = fit_linear_value(
            state.value_weights, states, inputs, run.ranks, state.value_positions
        )
    if all(map(math.isfinite, fit.weights)):
        state.value_weights = fit.weights
    states.clear()
    return dataclasses.replace(inputs, values=fit.values)
