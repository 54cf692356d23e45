"""Access to NVML, the management library of NVIDIA's driver."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pynvml


@contextmanager
def gpu_handles(chosen: Sequence[int] = ()) -> Iterator[list[object]]:
    """Context manager that opens NVML and yields handles of GPUs for the queries of pynvml.

    NVML counts references, so contexts can be nested. A query may raise pynvml.NVMLError.

    Args:
        chosen: indices of GPUs, as numbered by the driver; empty for all GPUs.

    Yields:
        The handles; an empty list if there is no driver or if a chosen GPU does not exist.
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
