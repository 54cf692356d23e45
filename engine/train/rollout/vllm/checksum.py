"""Computes a checksum of weights that does not depend on their arrangement in a model.

vLLM joins some matrices (query, key and value, for example) and pads the vocabulary with zeros. A
sum over all elements is the same for the parts as for the whole, so it can compare the policy's
weights with the engine's. It detects accidents, not attacks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.protocol.rollout.messages import Checksum

CHUNK = 1 << 22
"""Elements summed at a time, so that few are copied to int64."""
MASK = (1 << 64) - 1


def checksum(tensors: Iterable[Tensor]) -> Checksum:
    """Sum and sum of squares of the bit patterns of all elements, modulo 2⁶⁴.

    A half-loaded, stale or wrong tensor changes it; a permutation of elements does not.

    Args:
        tensors: of 2 or 4 bytes an element, on any device.
    """
    total, squares = 0, 0
    for tensor in tensors:
        one, two = _of(tensor)
        total, squares = total + one, squares + two
    return total & MASK, squares & MASK


def _of(tensor: Tensor) -> Checksum:
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(kind)
    sums = []
    for part in bits.split(CHUNK):
        wide = part.to(torch.int64)
        sums.append(torch.stack([wide.sum(), (wide * wide).sum()]))
    if not sums:
        return 0, 0
    total, squares = torch.stack(sums).sum(0).tolist()
    return int(total), int(squares)
