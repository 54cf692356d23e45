"""Whether an attempt's first rollout can be trusted."""

from torch import Tensor

from engine.errors import RlhfError
from engine.train.ppo import masked
from engine.train.ppo.forward import score_tokens
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run

GAP_LIMIT = 1e-4
"""Cached and full forward passes of one model agree to this, nats a token, in float32 …"""

MIXED_GAP_LIMIT = 0.5
"""… and to this in bfloat16, where only gross mistakes can be told."""


def check_first_rollout(
    run: Run, rollout: Rollout, old_logprobs: Tensor, ref_logprobs: Tensor
) -> None:
    """Compares a rollout with what must be true of any.

    A model whose cache, positions or masks are used wrongly still trains, on the wrong ratios: a
    few responses' log-probabilities while generating must be those of a full forward pass. Before
    the first update the policy is its reference, so the KL must be 0.

    Raises:
        RlhfError: they disagree by more than rounding.
    """
    few, name = rollout.rows[:4], type(run.policy.lm).__name__
    exact = run.config.model.dtype == "float32"
    full, _ = score_tokens(
        run.policy, rollout.select(few), run.config.rollout.temperature, len(few), want="logits"
    )
    gap = float((full - rollout.logprobs[few] * rollout.mask[few]).abs().max())
    if gap > (GAP_LIMIT if exact else MIXED_GAP_LIMIT):
        raise RlhfError(
            f"{name}: log-probabilities while generating and in a full forward pass differ by "
            f"{gap:.2g} nats on a token, more than rounding explains: this architecture cannot be "
            "trained safely here"
        )
    kl = float(masked.sequence_kl(old_logprobs, ref_logprobs, rollout.mask).abs().mean())
    own_start = run.config.model.reference is None and run.state.step == 0
    if exact and own_start and kl > GAP_LIMIT * rollout.ids.shape[1]:
        raise RlhfError(
            f"{name}: the KL to the reference is {kl:.2g} nats before the first update, not 0"
        )
