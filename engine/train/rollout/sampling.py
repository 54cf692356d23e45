"""Samples tokens from logits.

A scheme chooses each row's token from the row's probabilities and one uniform number alone. Two
machines, or two batch shapes, compute probabilities that differ in the last bits, which
occasionally changes a token. Schemes differ in how often this happens, per million tokens with
rounding errors of 1e-6 in the logits:

- `gumbel`: about one to five, for any vocabulary. No scheme can be below the total variation
  distance between the two distributions, and this is little above twice that (Daliri, Musco and
  Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding").
- `inverse_cdf`: hundreds to thousands with vocabularies of 50,000 tokens and more, since rounding
  moves each of as many boundaries.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Scheme = Callable[[Tensor, Tensor], Tensor]
"""Called with probabilities (n, V) float32 and uniforms (n,) float64; returns (n, 1) int64."""


class Distribution(NamedTuple):
    """Each row's distribution over the vocabulary; float32."""

    logprobs: Tensor
    """(n, V)."""
    probs: Tensor
    """(n, V)."""
    entropy: Tensor
    """(n,), in nats."""


def distribution(logits: Tensor, temperature: float) -> Distribution:
    """Computes the distributions of logits (n, V) of any dtype at a temperature > 0."""
    values = logits.float()
    scaled = values if temperature == 1.0 else values / temperature  # dividing by 1 would only copy
    logprobs = torch.log_softmax(scaled, dim=-1)
    probs = logprobs.exp()
    return Distribution(logprobs, probs, -(probs * logprobs.clamp(min=-1e4)).sum(-1))


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    scheme: str,
    distribution: Callable[[Tensor, float], Distribution] = distribution,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples a token from each row's full distribution.

    It never synchronises with the host and has fixed shapes, so a CUDA graph can capture it.

    Args:
        logits: (n, V), any dtype.
        uniforms: (n,) float64 in [0, 1), multiples of 2^-53.
        temperature: > 0.
        scheme: a name in :data:`SCHEMES`.
        distribution: computes the distributions; default: :func:`distribution`.

    Returns:
        Token (n,) int64, its log-probability (n,) float32, and the distribution's entropy (n,)
        float32, in nats.
    """
    logprobs, probs, entropy = distribution(logits, temperature)
    token = SCHEMES[scheme](probs, uniforms)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy


def gumbel(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The Gumbel-max trick as an exponential race, first between blocks, then within the winner.

    argmax p/E with independent E ~ Exp(1) has distribution p, and changes only where the two
    largest quotients are equal up to rounding. A block's probability is the sum over its tokens, so
    two races of about √V entries give the same distribution as one race of V, with a fraction of
    the random numbers.
    """
    vocabulary = probs.shape[1]
    size = block_size(vocabulary)
    rest = vocabulary % size
    blocks = probs[:, : vocabulary - rest].unflatten(1, (-1, size)).sum(-1)
    if rest:
        blocks = torch.cat([blocks, probs[:, -rest:].sum(-1, keepdim=True)], 1)
    index = torch.arange(blocks.shape[1] + size, device=probs.device)
    logs = log_uniforms(uniforms, index)  # -E, so the largest quotient is the smallest
    block = (blocks / logs[:, :-size]).argmin(1, keepdim=True)
    tokens = torch.add(index[:size], block, alpha=size)
    if rest:
        weights = probs.gather(1, tokens.clamp(max=vocabulary - 1))
        weights = weights.masked_fill(tokens >= vocabulary, 0.0)
    else:
        weights = probs.gather(1, tokens)
    return tokens.gather(1, (weights / logs[:, -size:]).argmin(1, keepdim=True))


def block_size(vocabulary: int) -> int:
    """Returns the power of 2 nearest √V. Sampled tokens depend on it, so it must not change."""
    return 1 << round(math.log2(vocabulary) / 2)


_GAMMA, *_FACTORS = (
    x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""SplitMix64's constants as int64, whose products wrap like those of uint64."""


def log_uniforms(uniforms: Tensor, index: Tensor) -> Tensor:
    """Derives log u, with independent u uniform in (0, 1), for each pair of uniform and index.

    u is a hash of the uniform's bits and the index, computed by integer operations that give the
    same bits on every device: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators") with the uniform as its seed.

    Args:
        uniforms: (n,) float64, multiples of 2^-53.
        index: (k,) int64.

    Returns:
        (n, k) float64, < 0.
    """
    x = torch.add((uniforms.double() * 2.0**53).long()[:, None], index, alpha=_GAMMA)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    # Maps the upper 52 bits, signed, to (k + 1/2) · 2^-52, which is never 0 or 1.
    return ((x >> 12).double() * 2.0**-52 + (0.5 + 2.0**-53)).log()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts zeros in from the left; `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The inverse of the cumulative distribution at the uniform's first 24 bits.

    Sessions from before other schemes existed use it, so it must not change.
    """
    first = ((uniforms * 2.0**24).floor() * 2.0**-24).float()
    # On a CPU, torch accumulates float32 sums in double. On a GPU it accumulates in float32, in a
    # different order for each prefix: over a long tail, rounding makes the sums non-monotonic, and
    # tokens of probability 0 would be sampled.
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    # The target is scaled by the last sum, which rounding leaves slightly off 1. right=True skips
    # tokens of probability 0 at u = 0. The clamp is for a product u·c that rounds up to c.
    target = (first * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[-1] - 1)


SCHEMES: dict[str, Scheme] = {"gumbel": gumbel, "inverse_cdf": inverse_cdf}
"""Sampling schemes by the value of `rollout.sampling`."""
