"""Every random choice, from (seed, purpose, numbers) alone.

No generator lives from one step to the next: a resumed run, or one on another number of ranks,
makes the same choices because they depend on nothing else. The streams are Philox's, counter-based
and keyed by 128 bits (Salmon et al. 2011); torch's own CPU generator takes 32 bits of its seed, too
few for a stream a step.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def derived_key(seed: int, purpose: str, *numbers: int) -> int:
    """128 bits that stand for these arguments and no others."""
    text = f"{seed}:{purpose}:{':'.join(map(str, numbers))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of its own, 63 bits."""
    return derived_key(seed, purpose, *numbers) >> 65


def sampling_uniforms(seed: int, step: int, batch: int, tokens: int) -> Tensor:
    """One uniform in [0, 1) for each (sample, token) of a step's global batch; (B, T) float32.

    Each sample has a stream of its own, so its uniforms depend neither on the batch size nor on the
    limit of tokens.
    """
    key = derived_key(seed, "sampling", step)
    rows = [
        np.random.Generator(np.random.Philox(key=key, counter=i << 128)).random(
            tokens, dtype=np.float32
        )
        for i in range(batch)
    ]
    return torch.from_numpy(np.stack(rows))


def permutation(seed: int, purpose: str, numbers: tuple[int, ...], n: int) -> Tensor:
    """A permutation of n; (n,) int64."""
    philox = np.random.Philox(key=derived_key(seed, purpose, *numbers))
    return torch.from_numpy(np.random.Generator(philox).permutation(n))
