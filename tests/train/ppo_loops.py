"""Drawn batches, and the formulas of PPO as slow loops over samples and tokens.

The drawn numbers are multiples of 1/64, which are exact in float32. So float32 and the loops, in
double precision, take the same branch of every max and clip. The tolerance of a sum is 1e-5 of the
sum of its terms' magnitudes: a few float32 roundings (6e-8 each) over at most 32 terms, and the
error of `exp`.
"""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

CLIPS = st.sampled_from([0.1, 0.2, 0.3])
KINDS = st.sampled_from(["token", "sequence", "sequence_mean"])
modest = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def batches(draw, tables, limit=4):
    """Lengths (B,), a width T that may exceed them all, and `tables` tables (B, T)."""
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    some = st.lists(st.integers(1, t), min_size=b, max_size=b)
    lengths = draw(st.one_of(some, st.just([t] * b), st.just([1] * b)))
    size = 64 * limit
    numbers = st.lists(st.integers(-size, size), min_size=b * t, max_size=b * t)
    values = [torch.tensor(draw(numbers)).reshape(b, t) / 64 for _ in range(tables)]
    return (torch.tensor(lengths), *values)


@st.composite
def masks(draw, tables):
    """A mask with gaps and at least one token per row, and `tables` tables (B, T)."""
    lengths, *values = draw(batches(tables))
    b, t = values[0].shape
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t)))
    mask = mask.reshape(b, t)
    mask[torch.arange(b), lengths - 1] = True
    return (mask, *values)


def near(got, want, size=1.0):
    return abs(float(got) - want) <= 1e-5 * (1.0 + size)


def kept(mask):
    """The (row, token) pairs of a mask."""
    return [(i, t) for i, row in enumerate(mask.tolist()) for t, on in enumerate(row) if on]


def slow_log_ratio(new, old, mask, kind):
    """{(i, t): log ρ}."""
    result = {}
    for i, t in kept(mask):
        tokens = [t] if kind == "token" else [s for j, s in kept(mask) if j == i]
        total = sum(float(new[i, s]) - float(old[i, s]) for s in tokens)
        total /= len(tokens) if kind == "sequence_mean" else 1
        result[i, t] = min(20.0, max(-20.0, total))
    return result


def slow_policy(new, old, advantages, mask, clip, kind, high=None):
    """{(i, t): (loss, whether the clip is active, log ρ, ρ)}."""
    high = clip if high is None else high
    result = {}
    for (i, t), log_rho in slow_log_ratio(new, old, mask, kind).items():
        rho, a = math.exp(log_rho), float(advantages[i, t])
        unclipped, clipped = -a * rho, -a * min(1 + high, max(1 - clip, rho))
        result[i, t] = (max(unclipped, clipped), clipped > unclipped, log_rho, rho)
    return result


def slow_gae(rewards, values, mask, gamma, lam):
    """{(i, t): advantage}, over the tokens of the mask alone."""
    result = {}
    for i in range(len(rewards)):
        advantage = following = 0.0
        for t in reversed([t for j, t in kept(mask) if j == i]):
            delta = float(rewards[i, t]) + gamma * following - float(values[i, t])
            advantage = delta + gamma * lam * advantage
            following = float(values[i, t])
            result[i, t] = advantage
    return result


def slow_moments(x, mask):
    numbers = [float(x[i, t]) for i, t in kept(mask)]
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((n - mean) ** 2 for n in numbers) / len(numbers)
