"""Frozen models on a CPU lie in a file, and take memory only while they are used.

Reference and reward model are read in one phase of a step and idle in the others, above all while
the policy is optimised, when gradients and activations need the room. Mapped from an unlinked
temporary file, their pages are let go as soon as they are read, block by block: they stay in the
system's cache as long as nobody else needs the memory, and come back at a page fault for 64 KB
(20 ms for 540 MB). So a frozen model never has more than a block and its embedding in memory.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

log = logging.getLogger("engine")

ALIGNMENT = 64
"""Bytes; a tensor's place must not decide which kernel computes with it."""


def back_by_file(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Moves a frozen model's weights, whole and on the CPU, into a file under $TMPDIR.

    Where that has no room they stay in memory.

    Args:
        module: the model.
        blocks: its layers, each of which is let go when it has been passed through.
    """
    places, size = {}, 0
    for parameter in module.parameters():  # tied ones come once
        places[parameter], size = size, size + -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    with tempfile.TemporaryFile(prefix="rlhf-tui-") as file:
        try:
            # A disk that is full must say so here; in a mapping it would be a bus error.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            log.warning("frozen weights stay in memory: %s: %s", tempfile.gettempdir(), error)
            return
        space = mmap.mmap(file.fileno(), max(size, 1))
    for parameter, place in places.items():
        there = torch.frombuffer(
            space, dtype=parameter.dtype, count=parameter.numel(), offset=place
        ).view(parameter.shape)
        parameter.data = there.copy_(parameter.data)
    module.rests_in_file = space  # type: ignore[assignment]
    for block in blocks:
        own = [(places[p], places[p] + p.nbytes) for p in block.parameters()]
        if own:
            # From the page it begins in: what shares that page with it is only read again.
            first = min(a for a, _ in own) // mmap.PAGESIZE * mmap.PAGESIZE
            drop = partial(space.madvise, mmap.MADV_DONTNEED, first, max(b for _, b in own) - first)
            block.register_forward_hook(partial(_passed, drop))
    drop_pages(module)


def _passed(drop: Callable[[], None], *_args: Any) -> None:
    drop()


def drop_pages(model: Any) -> None:
    """The pages of a model that rests in a file are dropped; the next use finds them again."""
    space = getattr(model, "rests_in_file", None)
    if space is not None:
        space.madvise(mmap.MADV_DONTNEED)
