"""Access to NVML, the management library of NVIDIA's driver."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pynvml


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES, by which a scheduler assigns GPUs; None if it is unset.

    Entries are numbers, or identifiers of GPUs (`GPU-...`) or of parts of one (`MIG-...`). Those
    after an invalid entry do not count, as in CUDA.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    entries = []
    for entry in (e.strip() for e in value.split(",")):
        if not entry or entry.startswith("-"):
            break
        entries.append(entry)
    return entries


def chosen_gpus(chosen: Sequence[int]) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES for the GPUs of `launch.gpus`.

    If a scheduler has assigned GPUs by number, `chosen` are the driver's numbers. Those that were
    not assigned are left out, so that CUDA reports that there is no GPU. If it has assigned them by
    identifier, `chosen` are positions in its list.
    """
    visible, numbers = visible_gpus(), [str(i) for i in chosen]
    if visible is None:
        return numbers
    if all(entry.isdecimal() for entry in visible):
        return [n for n in numbers if n in visible]
    return [visible[i] for i in chosen if i < len(visible)]


@contextmanager
def gpu_handles(chosen: Sequence[int] = ()) -> Iterator[list[object]]:
    """Context manager that opens NVML and yields handles of GPUs for the queries of pynvml.

    NVML counts references, so contexts can be nested. A query may raise pynvml.NVMLError.

    Args:
        chosen: `launch.gpus`; empty for all GPUs that are visible to CUDA.

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
            entries = chosen_gpus(chosen) if chosen else visible_gpus()
            if entries is None:
                entries = [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
            handles = [_handle(entry) for entry in entries]
        except pynvml.NVMLError:
            handles = []
        yield handles
    finally:
        pynvml.nvmlShutdown()


def _handle(entry: str) -> object:
    if entry.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(entry))
    return pynvml.nvmlDeviceGetHandleByUUID(entry)
