"""What the models say about a step's responses before the update: log-probabilities and values."""

from dataclasses import dataclass

from torch import Tensor

from engine.progress import ReportProgress, report_nothing
from engine.train.ppo.forward import MicroBatchLimit, longest_first, score_tokens
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run


@dataclass(frozen=True)
class ModelOutputs:
    """For each response token; (B, T) float32 each, 0 beyond a response's length."""

    ref_logprobs: Tensor
    """log π_ref."""
    old_logprobs: Tensor
    """log π_old, of the policy before its update."""
    old_values: Tensor
    """V_old; 0 if the policy has no value function."""
    squared_probs: Tensor | None
    """Σ π_old² over the vocabulary; None unless the advantage estimator needs it."""


def compute_outputs(run: Run, step: int, rollout: Rollout) -> ModelOutputs:
    """Computes the outputs of reference and policy for a step's responses; a collective.

    Args:
        run: the run, before the step's update.
        step: from 1.
        rollout: B responses of at most T tokens.
    """
    temperature, limit = run.config.rollout.temperature, MicroBatchLimit.of(run.config, rollout)
    rows = run.ranks.strided_share(longest_first(rollout, rollout.rows))
    with run.phase(step, "reference") as report:
        ref_logprobs, _ = score_tokens(
            run.reference, rollout, temperature, limit, rows=rows, want="logits", report=report
        )
        ref_logprobs = run.ranks.all_reduce_sum(ref_logprobs)
        old_logprobs, old_values = old_policy_outputs(run, rollout, rows, report)
        squared_probs: Tensor | None = None
        if run.config.ppo.traits.squared_probs:
            squared_probs = squared_probabilities(run, rollout, old_logprobs, rows, report)
    return ModelOutputs(ref_logprobs, old_logprobs, old_values, squared_probs)


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
