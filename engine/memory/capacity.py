"""What memory this machine has, for ranks to be planned into."""

import contextlib
from pathlib import Path
from typing import Literal

import psutil
import pynvml
from msgspec import Struct

from engine.nvml import gpu_handles

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container or a batch scheduler says how much of the machine a job may have."""


class Capacity(Struct, frozen=True, kw_only=True):
    """Memory that ranks may use."""

    device: Literal["cpu", "cuda"]
    total: int
    """Bytes: of the smallest chosen GPU, each rank's own; or of the host, shared by all ranks."""
    free: int
    """Of it, what nobody else holds now."""
    gpus: int = 0
    """How many were chosen."""

    def room(self, ranks: int) -> int:
        """Bytes for each of so many ranks on this machine."""
        return self.total if self.device == "cuda" else self.total // ranks


def of_host() -> Capacity:
    """The host's memory, or as much of it as this process may use."""
    memory = psutil.virtual_memory()
    total = memory.total
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or `max`
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return Capacity(device="cpu", total=total, free=min(total, memory.available))


def of_gpus(chosen: list[int]) -> Capacity | None:
    """The chosen GPUs' memory (all GPUs', when none is named); None where there is no GPU."""
    with gpu_handles(chosen) as handles:
        try:
            memories = [pynvml.nvmlDeviceGetMemoryInfo(h) for h in handles]
        except pynvml.NVMLError:
            return None
    if not memories:
        return None
    total = min(int(m.total) for m in memories)
    free = min(int(m.free) for m in memories)
    return Capacity(device="cuda", total=total, free=free, gpus=len(memories))


def of_device(device: Literal["cpu", "cuda"], chosen: list[int]) -> Capacity:
    """Of the GPUs where ranks compute on them, else of the host."""
    return (of_gpus(chosen) if device == "cuda" else None) or of_host()
