"""Sampling of tokens from logits."""

import torch
from torch import Tensor


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse-transform sampling from each row's full distribution.

    Args:
        logits: (n, V), any dtype.
        uniforms: (n,) in [0, 1).
        temperature: > 0.

    Returns:
        Token (n,) int64, its log-probability (n,) float32, and the distribution's entropy (n,)
        float32, in nats.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logprobs.exp()
    # On a CPU, torch accumulates float32 sums in double. On a GPU it accumulates in float32, in a
    # different order for each prefix: over a long tail, rounding makes the sums non-monotonic, and
    # tokens of probability 0 would be sampled.
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    # The target is scaled by the last sum, which rounding leaves slightly off 1. right=True skips
    # tokens of probability 0 at u = 0. The clamp is for a product u·c that rounds up to c.
    target = (uniforms * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy
