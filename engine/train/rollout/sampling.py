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
        token (n,) int64, its log-probability (n,) and the distribution's entropy (n,), float32.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logprobs.exp()
    # A CPU adds in double anyway. A GPU would add in float32, each prefix in another order: over a
    # long tail its sums go up and down by rounding, and tokens of no probability are drawn.
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    # Scaled by the last sum, which rounding leaves a little off 1; right=True skips tokens of
    # probability 0 at u = 0; clamped for u·c that rounds up to c itself.
    at = (uniforms * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[-1] - 1)
    entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy
