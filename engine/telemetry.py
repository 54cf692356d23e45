"""What the machine does: processors, memory, disk, and GPUs where there are any."""

import logging
import os
import time
from pathlib import Path

import psutil
import pynvml

from engine.control import Gpu, RankLoad, Telemetry

log = logging.getLogger("engine")


class Sampler:
    """Reads the machine; cheap enough for every few seconds."""

    def __init__(self, folder: Path) -> None:
        """`folder`: whose disk is watched."""
        self._folder = folder
        self._ranks: dict[int, psutil.Process] = {}
        psutil.cpu_percent()  # the first reading of a span is meaningless
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError:
            self._gpus = []

    def sample(self, rank_pids: dict[int, int]) -> Telemetry:
        """One reading; ranks by number and process id."""
        memory = psutil.virtual_memory()
        disk = os.statvfs(self._folder)
        return Telemetry(
            time=time.time(),
            cpu=psutil.cpu_percent(),
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_free=disk.f_bavail * disk.f_frsize,
            ranks=[r for n, pid in rank_pids.items() if (r := self._rank(n, pid)) is not None],
            gpus=[g for i, h in enumerate(self._gpus) if (g := _gpu(i, h)) is not None],
        )

    def _rank(self, rank: int, pid: int) -> RankLoad | None:
        try:
            process = self._ranks.get(pid)
            if process is None:
                process = self._ranks[pid] = psutil.Process(pid)
                process.cpu_percent()
            return RankLoad(
                rank=rank, pid=pid, cpu=process.cpu_percent(), memory=process.memory_info().rss
            )
        except psutil.Error:  # it ended meanwhile
            self._ranks.pop(pid, None)
            return None


def _gpu(index: int, handle: object) -> Gpu | None:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Gpu(
            index=index,
            name=str(pynvml.nvmlDeviceGetName(handle)),
            utilisation=float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            memory_used=int(memory.used),
            memory_total=int(memory.total),
            temperature=float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            power=pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )
    except pynvml.NVMLError as error:
        log.debug("GPU %d cannot be read: %s", index, error)
        return None


def busy_gpus(chosen: list[int]) -> list[str]:
    """Those of the chosen GPUs (all, when none is named) that hold over 1 GB already, in words."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [g for i, h in enumerate(handles) if (g := _gpu(i, h)) is not None]
    except pynvml.NVMLError:
        return []
    return [
        f"GPU {g.index} ({g.name}) already holds {g.memory_used / 1e9:.1f} GB"
        for g in gpus
        if g.memory_used > 1e9 and (not chosen or g.index in chosen)
    ]
