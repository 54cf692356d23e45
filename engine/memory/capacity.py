"""The memory of this machine, and of others like it."""

import contextlib
from pathlib import Path
from typing import Literal

import psutil
import pynvml
from msgspec import Struct
from msgspec.structs import replace

from engine.nvml import gpu_handles

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which a container or a batch scheduler limits a job's memory."""


class Capacity(Struct, frozen=True, kw_only=True):
    """Memory that ranks can use."""

    device: Literal["cpu", "cuda"]
    total: int
    """Bytes of the smallest chosen GPU (one per rank), or of the host (shared by all ranks)."""
    free: int
    """Bytes of `total` that are not in use now."""
    gpus: int = 0
    """The number of chosen GPUs."""
    nodes: int = 1
    """The number of machines that share the run's ranks, each with as much memory and GPUs."""
    supposed: bool = False
    """Whether it is that of other machines, not measured here."""

    def less(self, taken: int) -> "Capacity":
        """Returns the capacity left if another program takes some of it."""
        return replace(self, total=max(0, self.total - taken), free=max(0, self.free - taken))

    def room(self, ranks: int) -> int:
        """Bytes for each of `ranks` ranks, which are spread over all machines."""
        return self.total if self.device == "cuda" else self.total // -(-ranks // self.nodes)


def of_host() -> Capacity:
    """Returns the host's memory, or this process's limit if that is lower."""
    memory = psutil.virtual_memory()
    total = memory.total
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return Capacity(device="cpu", total=total, free=min(total, memory.available))


def of_gpus(chosen: list[int]) -> Capacity | None:
    """Returns the memory of the chosen GPUs (all if the list is empty); None without a GPU."""
    memories = []
    with gpu_handles(chosen) as handles:
        for handle in handles:
            # One that has failed does not answer; one that uses the host's memory has none.
            with contextlib.suppress(pynvml.NVMLError):
                memories.append(pynvml.nvmlDeviceGetMemoryInfo(handle))
    if not memories:
        return None
    total = min(int(m.total) for m in memories)
    free = min(int(m.free) for m in memories)
    return Capacity(device="cuda", total=total, free=free, gpus=len(memories))


def supposed_gpus(count: int, gigabytes: float) -> Capacity:
    """The memory of GPUs of another machine; `gigabytes` is that of each, in 10⁹ bytes."""
    total = round(gigabytes * 1e9)
    return Capacity(device="cuda", total=total, free=total, gpus=count, supposed=True)


def of_device(device: Literal["cpu", "cuda"], chosen: list[int]) -> Capacity:
    """Returns the memory of the device that ranks compute on; the host's if there is no GPU."""
    return (of_gpus(chosen) if device == "cuda" else None) or of_host()
