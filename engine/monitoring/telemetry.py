"""Measures the machine: processors, memory, disk and GPUs."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pynvml
from msgspec.structs import replace

from engine.nvml import gpu_handles
from engine.protocol.client_messages import Gpu, RankLoad, Telemetry
from engine.protocol.rank_messages import RankTimes

log = logging.getLogger("engine")


class GpuReader:
    """Reads the GPUs. A driver may take minutes to answer after a GPU has failed."""

    def __init__(self) -> None:
        # Kept open after the first reading: opening the driver costs more than a reading.
        self._open = ExitStack()
        self._handles: list[object] | None = None
        self._silent: set[int] = set()

    @property
    def has_none(self) -> bool:
        """Whether a reading has found that there are no GPUs."""
        return self._handles == []

    def read(self) -> list[Gpu]:
        """Reads all GPUs that answer; logs once if one does not."""
        if self._handles is None:
            self._handles = self._open.enter_context(gpu_handles())
        found = []
        for index, handle in enumerate(self._handles):
            try:
                found.append(_gpu(index, handle))
                self._silent.discard(index)
            except pynvml.NVMLError as error:  # it has failed, for example
                if index not in self._silent:
                    log.warning("GPU %d does not answer: %s", index, error)
                self._silent.add(index)
        return found


class Sampler:
    """Measures the machine's load. Cheap enough to call every few seconds."""

    def __init__(self, folder: Path) -> None:
        """Measures nothing yet.

        Args:
            folder: a folder on the disk whose free space is measured.
        """
        self._folder = folder
        self._ranks: dict[int, psutil.Process] = {}
        psutil.cpu_percent()  # the first call only starts the measured interval

    def sample(
        self, rank_pids: dict[int, int], times: dict[int, RankTimes], gpus: list[Gpu]
    ) -> Telemetry:
        """Measures once.

        Args:
            rank_pids: rank → process id, of the ranks on this machine.
            times: rank → duration of the last step, of all ranks.
            gpus: of :class:`GpuReader`.
        """
        memory = psutil.virtual_memory()
        disk = os.statvfs(self._folder)
        return Telemetry(
            time=time.time(),
            cpu=psutil.cpu_percent(),
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_free=disk.f_bavail * disk.f_frsize,
            ranks=[
                load
                for rank in sorted(rank_pids | times)
                if (load := self._rank(rank, rank_pids.get(rank), times.get(rank))) is not None
            ],
            gpus=gpus,
        )

    def _rank(self, rank: int, pid: int | None, times: RankTimes | None) -> RankLoad | None:
        load = RankLoad(rank=rank, pid=0, cpu=0.0, memory=0)
        if times is not None:
            load = replace(
                load,
                seconds=times.seconds,
                peak_memory=times.peak_memory,
                on_gpu=times.on_gpu,
            )
        if pid is None:  # on another machine
            return load
        try:
            process = self._ranks.get(pid)
            if process is None:
                process = self._ranks[pid] = psutil.Process(pid)
                process.cpu_percent()
            return replace(
                load, pid=pid, cpu=process.cpu_percent(), memory=process.memory_info().rss
            )
        except psutil.Error:  # the process has ended
            self._ranks.pop(pid, None)
            return None


def _gpu(index: int, handle: object) -> Gpu:
    """Reads one GPU. Raises pynvml.NVMLError if it does not answer."""

    def read(query: Callable[[], float]) -> float | None:
        # A part of a GPU (MIG), a virtual one or a consumer's card does not support all of them.
        try:
            return float(query())
        except pynvml.NVMLError:
            return None

    sensor = pynvml.NVML_TEMPERATURE_GPU
    name = str(pynvml.nvmlDeviceGetName(handle))
    used, total = _memory(handle)
    power = read(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    number = read(lambda: pynvml.nvmlDeviceGetIndex(handle))
    return Gpu(
        index=index if number is None else int(number),
        name=name,
        utilisation=read(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        memory_used=used,
        memory_total=total,
        temperature=read(lambda: pynvml.nvmlDeviceGetTemperature(handle, sensor)),
        power=None if power is None else power / 1000,
    )


def _memory(handle: object) -> tuple[int, int]:
    """Used and total bytes; zeros for a GPU that uses the host's memory.

    The second version of the query, since driver 510, leaves out what the driver keeps for itself
    (up to 1 GB), as nvidia-smi does.
    """
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError_NotSupported:
            return 0, 0
    return int(memory.used), int(memory.total)


def gpu_count() -> int:
    """The number of GPUs that ranks will see; 0 without a driver."""
    with gpu_handles() as handles:
        return len(handles)


def busy_gpus(chosen: list[int], first: int | None = None) -> list[str]:
    """A line for each GPU of a run with over 1 GB in use.

    Args:
        chosen: `launch.gpus`; all, if none is named.
        first: how many of them are used, from the first one on; all by default.
    """
    gpus = []
    with gpu_handles(chosen) as handles:
        for index, handle in enumerate(handles[:first]):
            with suppress(pynvml.NVMLError):
                gpus.append(_gpu(index, handle))
    return [
        f"GPU {g.index} ({g.name}) already holds {g.memory_used / 1e9:.1f} GB"
        for g in gpus
        if g.memory_used > 1e9
    ]
