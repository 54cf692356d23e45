"""Checks each attempt's first rollout, and every rollout that another engine generated."""

import math

from torch import Tensor

from engine.errors import RlhfError
from engine.train.ppo import masked
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run

GAP_LIMIT = 1e-4
"""Largest difference in nats per token between cached and full forward passes in float32. A
temperature below 1 divides the rounding of logits as it does logits, and the limits with them."""

MIXED_GAP_LIMIT = 0.3
"""The same in bfloat16, for the mean over a response: only gross errors can be told apart from
rounding, and a few of the thousands of tokens in a long response always differ by more."""

ENGINE_GAP_LIMIT = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest mean difference, in nats per token, for a step of an engine with the right weights."""


def check_rollout(
    run: Run, step: int, rollout: Rollout, old_logprobs: Tensor, ref_logprobs: Tensor
) -> None:
    """Checks a rollout of the policy before the step's update.

    Args:
        run: the run.
        step: from 1.
        rollout: B responses of at most T tokens.
        old_logprobs: (B, T) float32, by the policy.
        ref_logprobs: (B, T) float32.

    Raises:
        RlhfError: the rollout does not come from the policy, or the policy cannot be trained
            safely.
    """
    if not run.rollout_checked:
        check_first_rollout(run, rollout, old_logprobs, ref_logprobs)
        run.rollout_checked = True
    if run.backend.separate:
        check_weights(run, step, rollout, old_logprobs)


def version_lag(rollout: Rollout, step: int) -> int:
    """Counts the updates between the weights that sampled the oldest response and the policy.

    Args:
        rollout: the step's rollout.
        step: from 1; the policy has the weights after the update of the step before.
    """
    if rollout.versions is None:
        return 0
    return step - 1 - int(rollout.versions.min())


def check_weights(run: Run, step: int, rollout: Rollout, old_logprobs: Tensor) -> None:
    """Checks in every step that another engine generated with permitted weights.

    Args:
        run: the run, before the step's update.
        step: from 1.
        rollout: B responses of at most T tokens.
        old_logprobs: (B, T) float32, by the policy.

    Raises:
        RlhfError: the version or the log-probabilities show that the weights were wrong. The
            log-probabilities of weights that are one update old are not compared, since they must
            differ.
    """
    if rollout.versions is None:
        return
    lags = step - 1 - rollout.versions
    least, most = int(lags.min()), int(lags.max())
    if least < 0 or most > run.config.rollout.ahead:
        wrong = least if least < 0 else most
        raise RlhfError(f"the rollout engine generated with weights that are {wrong} updates old")
    present = rollout.mask & (lags == 0)[:, None]
    if not present.any():
        return
    gap = float(masked.masked_mean((old_logprobs - rollout.logprobs).abs(), present))
    if not gap <= ENGINE_GAP_LIMIT[run.config.model.dtype]:  # NaN, too
        raise RlhfError(
            f"the rollout engine's log-probabilities differ from the policy's by {gap:.2g} nats "
            "per token: it does not compute the same model"
        )


def check_first_rollout(
    run: Run, rollout: Rollout, old_logprobs: Tensor, ref_logprobs: Tensor
) -> None:
    """Checks what must hold for any rollout; called once per attempt.

    A model whose cache, positions or masks are misused still trains, but with wrong ratios. So the
    log-probabilities recorded while generating a few responses are compared with those of a full
    forward pass as the update makes it: in training mode with activation checkpointing, in which
    the routers of some mixtures of experts add noise. Also, before the first update the policy
    equals the reference: the KL must be 0.

    Args:
        run: the run, before this attempt's first update.
        rollout: B responses of at most T tokens.
        old_logprobs: (B, T) float32, of the policy that sampled.
        ref_logprobs: (B, T) float32.

    Raises:
        RlhfError: a difference is larger than rounding explains.
    """
    few, name = rollout.rows[:4], type(run.policy.lm).__name__
    temperature = run.config.rollout.temperature
    rounding = 1 / min(temperature, 1.0)
    exact = run.config.model.dtype == "float32"
    checkpointing = run.config.parallel.activation_checkpointing
    run.policy.train(checkpointing)
    full, _ = score_tokens(
        run.policy,
        rollout.select(few),
        temperature,
        MicroBatchLimit(min(len(few), run.config.ppo.micro_batch_size)),
        want="logits",
    )
    run.policy.eval()
    gaps = (full - rollout.logprobs[few] * rollout.mask[few]).abs()
    if not exact:
        gaps = gaps.sum(1) / rollout.lengths[few]
    gap = float(gaps.max())
    if not math.isfinite(gap):
        raise RlhfError(
            f"{name}: log-probabilities are not finite before the update of step "
            f"{run.state.step + 1}: its weights are damaged, or have grown too large; take another "
            "model.policy, or resume from an earlier checkpoint with a lower train.learning_rate"
        )
    if gap > rounding * (GAP_LIMIT if exact else MIXED_GAP_LIMIT):
        raise RlhfError(
            f"{name}: log-probabilities while generating and in a full forward pass differ by "
            f"{gap:.2g} nats {'on a' if exact else 'per'} token, more than rounding explains: this "
            f"architecture cannot be trained safely here{' with' if checkpointing else ''}"
            f"{' parallel.activation_checkpointing' if checkpointing else ''}"
        )
    kl = float(masked.sequence_kl(old_logprobs, ref_logprobs, rollout.mask).abs().mean())
    starts_at_reference = run.config.model.reference_is_policy and run.state.step == 0
    if exact and starts_at_reference and kl > rounding * GAP_LIMIT * rollout.ids.shape[1]:
        raise RlhfError(
            f"{name}: the KL to the reference is {kl:.2g} nats before the first update, not 0"
        )
