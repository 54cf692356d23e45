"""The library of NVIDIA's driver (NVML), open for as long as GPUs are asked about."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pynvml


@contextmanager
def gpu_handles(chosen: Sequence[int] = ()) -> Iterator[list[object]]:
    """Handles of GPUs by the driver's numbers (of all, when none is named), for pynvml's queries.

    The list is empty where there is no driver, or not every chosen GPU. Opening counts references:
    handles stay valid while any block is open. Queries themselves may raise pynvml.NVMLError.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        try:
            numbers = chosen or range(pynvml.nvmlDeviceGetCount())
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in numbers]
        except pynvml.NVMLError:
            handles = []
        yield handles
    finally:
        pynvml.nvmlShutdown()
