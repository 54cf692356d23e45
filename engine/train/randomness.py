"""Every random choice, from (seed, purpose, numbers) alone.

No generator lives from one step to the next: a resumed run, or one on another number of ranks,
makes the same choices because they depend on nothing else.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own for one purpose; the same arguments give the same one."""
    text = f"{seed}:{purpose}:{':'.join(map(str, numbers))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def sampling_uniforms(seed: int, step: int, batch: int, tokens: int) -> Tensor:
    """One uniform in [0, 1) for each (sample, token) of a step's global batch; (B, T) float32."""
    return torch.rand(batch, tokens, generator=generator(seed, "sampling", step))


def permutation(seed: int, purpose: str, numbers: tuple[int, ...], n: int) -> Tensor:
    """A permutation of n; (n,) int64."""
    return torch.randperm(n, generator=generator(seed, purpose, *numbers))
