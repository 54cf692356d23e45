"""Memory-maps the frozen models of a CPU run, so that they occupy memory only while they are used.

The reference and the reward model are used in one phase of a step. In the other phases, above all
during optimisation, gradients and activations need the memory. The weights are mapped from an
unlinked temporary file and their pages dropped after use, one block at a time. Dropped pages stay
in the page cache until the system needs the memory; reading them again costs one page fault per
64 KB (20 ms for 540 MB). A frozen model therefore occupies about one block and its embedding.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.train.distributed.stored_tensor import replace_values, stored_of

log = logging.getLogger("engine")

ALIGNMENT = 64
"""Bytes. A kernel may be chosen by the alignment of its arguments; this keeps the choice fixed."""


def back_by_file(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Moves the weights of a frozen model into a memory-mapped file under $TMPDIR.

    Weights that are still in the model's own files are read into the mapping, one at a time.

    If the file system has too little space the weights stay where they are and a warning is logged.

    Args:
        module: the model, unsharded and on the CPU.
        blocks: its layers; the pages of each are dropped after its forward pass.

    Raises:
        OSError: a file of the weights cannot be read.
    """
    offsets, size = {}, 0
    for parameter in module.parameters():  # yields tied parameters once
        offsets[parameter], size = size, size + -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    with tempfile.TemporaryFile(prefix="rlhf-tui-") as file:
        try:
            # Reserve the space now: writing to a mapping on a full disk raises SIGBUS.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            log.warning("frozen weights stay in memory: %s: %s", tempfile.gettempdir(), error)
            return
        mapping = mmap.mmap(file.fileno(), max(size, 1))

    def mapped(parameter: nn.Parameter) -> Tensor:
        values = torch.frombuffer(
            mapping, dtype=parameter.dtype, count=parameter.numel(), offset=offsets[parameter]
        ).view(parameter.shape)
        stored = stored_of(parameter)
        if stored is None:
            values.copy_(parameter.data)
        else:
            stored.read_into(values)
        mapping.madvise(mmap.MADV_DONTNEED)
        return values

    replace_values(module, mapped)
    module.file_mapping = mapping  # type: ignore[assignment]  # an attribute of our own
    first = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    for block in blocks:
        starts = [(p.data_ptr() - first, p.nbytes) for p in block.parameters()]
        extents = [(start, start + size) for start, size in starts]
        if extents:
            # Rounded down to a page: a neighbour on that page is read again when it is used.
            start = min(a for a, _ in extents) // mmap.PAGESIZE * mmap.PAGESIZE
            length = max(b for _, b in extents) - start
            drop = partial(mapping.madvise, mmap.MADV_DONTNEED, start, length)
            block.register_forward_hook(partial(_drop_after_forward, drop))
    drop_pages(module)


def _drop_after_forward(drop: Callable[[], None], *_hook_arguments: Any) -> None:
    drop()


def drop_pages(model: Any) -> None:
    """Drops the pages of a file-backed model; the next use reads them from the file.

    Does nothing for a model that is not file-backed.
    """
    mapping = getattr(model, "file_mapping", None)
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)
