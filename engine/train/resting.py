"""Frozen models on a CPU lie in a file, and take memory only while they are used.

Reference and reward model are read in one phase of a step and idle in the others, above all while
the policy is optimised, when gradients and activations need the room. Mapped from an unlinked
temporary file, their pages can be let go after each use: they stay in the system's cache as long
as nobody else needs the memory, and come back at a page fault for 64 KB (20 ms for 540 MB).
"""

import ctypes
import logging
import mmap
import os
import tempfile
from typing import Any

import torch
from torch import nn

log = logging.getLogger("engine")

ALIGNMENT = 64
"""Bytes; a tensor's place must not decide which kernel computes with it."""


def rest_in_file(module: nn.Module) -> None:
    """Moves a frozen model's weights, whole and on the CPU, into a file under $TMPDIR.

    Where that has no room they stay in memory.
    """
    places, size = {}, 0
    for name, parameter in module.named_parameters():  # tied ones come once
        places[name], size = size, size + -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    with tempfile.TemporaryFile(prefix="rlhf-tui-") as file:
        try:
            # A disk that is full must say so here; in a mapping it would be a bus error.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            log.warning("frozen weights stay in memory: %s: %s", tempfile.gettempdir(), error)
            return
        space = mmap.mmap(file.fileno(), max(size, 1))
    for name, parameter in module.named_parameters():
        there = torch.frombuffer(
            space, dtype=parameter.dtype, count=parameter.numel(), offset=places[name]
        ).view(parameter.shape)
        parameter.data = there.copy_(parameter.data)
    module.rests_in_file = space  # type: ignore[assignment]
    let_go(module)


def make_room(model: Any) -> None:
    """Before a model that rests in a file is used: memory that was freed goes back to the system.

    The ranks' allocator keeps what it was given (see `launcher.MALLOC`); without this the model's
    pages would come on top of all that the epochs before had taken.
    """
    if getattr(model, "rests_in_file", None) is not None:
        _trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if _trim is not None:  # glibc's; others give back by themselves
            _trim(0)


def let_go(model: Any) -> None:
    """The pages of a model that rests in a file are dropped; the next use finds them again."""
    space = getattr(model, "rests_in_file", None)
    if space is not None:
        space.madvise(mmap.MADV_DONTNEED)
