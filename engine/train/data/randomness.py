"""Random streams derived from (seed, purpose, numbers).

No generator keeps state from one step to the next. So a resumed run, or a run on another number of
ranks, draws the same numbers. The generator is Philox, which is counter-based (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), with a key of 128 bits. torch's CPU generator uses
only 32 bits of its seed, too few for one stream per step.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def derived_key(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a 128-bit key, BLAKE2b of the arguments: different arguments give different keys."""
    text = f"{seed}:{purpose}:{':'.join(map(str, numbers))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a 63-bit seed from the same hash, for generators that take an int64."""
    return derived_key(seed, purpose, *numbers) >> 65


def sampling_uniforms(seed: int, step: int, batch: int, tokens: int) -> Tensor:
    """Returns a uniform number in [0, 1) per (sample, token) of a step's global batch.

    Each sample has its own two streams, so its numbers depend neither on `batch` nor on `tokens`.
    One stream gives the first 24 bits of a number, the only ones that sampling by `inverse_cdf`
    reads; the other stream gives the other 29.

    Returns:
        (batch, tokens) float64, multiples of 2^-53.
    """
    if not batch:
        return torch.empty(0, tokens, dtype=torch.float64)
    return torch.stack([sample_uniforms(seed, step, i, tokens) for i in range(batch)])


def sample_uniforms(seed: int, step: int, sample: int, tokens: int) -> Tensor:
    """Returns one row of :func:`sampling_uniforms`; (tokens,) float64."""
    first, others = derived_key(seed, "sampling", step), derived_key(seed, "sampling bits", step)
    numbers = _stream(first, sample).random(tokens, dtype=np.float32).astype(np.float64)
    numbers += _stream(others, sample).integers(1 << 29, size=tokens) * 2.0**-53
    return torch.from_numpy(numbers)


def _stream(key: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=number << 128))


def permutation(seed: int, purpose: str, numbers: tuple[int, ...], n: int) -> Tensor:
    """Returns a random permutation of 0 … n − 1; (n,) int64."""
    philox = np.random.Philox(key=derived_key(seed, purpose, *numbers))
    return torch.from_numpy(np.random.Generator(philox).permutation(n))
