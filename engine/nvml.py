"""Access to NVML, the management library of NVIDIA's driver."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

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
def _nvml() -> Iterator[bool]:
    """Context manager that opens NVML; yields whether there is a driver that answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def gpu_handles(chosen: Sequence[int] = ()) -> Iterator[list[object]]:
    """Context manager that opens NVML and yields handles of GPUs for the queries of pynvml.

    NVML counts references, so contexts can be nested. A query may raise pynvml.NVMLError.

    Args:
        chosen: `launch.gpus`; empty for all GPUs that are visible to CUDA.

    Yields:
        The handles, without GPUs that do not exist or do not answer; empty if there is no driver.
        If a GPU is divided (MIG), only one: that of the first part, all that CUDA uses.
    """
    with _nvml() as opened:
        yield _handles(chosen) if opened else []


def _handles(chosen: Sequence[int]) -> list[object]:
    entries = chosen_gpus(chosen) if chosen else visible_gpus()
    if entries is None:
        entries = [str(i) for i in range(_count())]
    found = []
    for entry in entries:
        with suppress(pynvml.NVMLError):
            handle = _handle(entry)
            if entry.startswith("MIG-") or (part := _first_part(handle)) is not None:
                return [handle if entry.startswith("MIG-") else part]
            found.append(handle)
    return found


def _count() -> int:
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def _handle(entry: str) -> object:
    if entry.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(entry))
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(entry)
    except pynvml.NVMLError:
        for index in range(_count()):  # CUDA takes the beginning of an identifier as well
            handle: object = pynvml.nvmlDeviceGetHandleByIndex(index)
            if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(entry):
                return handle
        raise


def _first_part(gpu: object) -> object | None:
    """The first part of a GPU that is divided (MIG); None if it is whole."""
    try:
        divided, _ = pynvml.nvmlDeviceGetMigMode(gpu)
        parts = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if divided else 0
    except pynvml.NVMLError:  # most kinds of GPUs cannot be divided
        return None
    for index in range(parts):
        with suppress(pynvml.NVMLError):  # fewer parts than there could be
            part: object = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            return part
    return None


def driver_version() -> tuple[str, tuple[int, int]]:
    """The version of NVIDIA's driver, and the newest version of CUDA that it supports.

    Raises:
        pynvml.NVMLError: there is no driver, or it does not answer.
    """
    pynvml.nvmlInit()
    try:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion())  # 13000 for 13.0
        return str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10)
    finally:
        pynvml.nvmlShutdown()


def driver_problem() -> str:
    """Why the driver of this machine does not answer; "" if it does, or if there is none."""
    try:
        driver_version()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ""  # as on a machine without a GPU
    except pynvml.NVMLError as error:
        return f"NVIDIA's driver does not answer ({error}): after an update of it, reboot"
    return ""


def silent_gpus() -> list[str]:
    """A line for each GPU that the driver has and that does not answer, with NVML's reason."""
    found = []
    with _nvml() as opened:
        for index in range(_count() if opened else 0):
            try:
                pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
            except pynvml.NVMLError as error:
                found.append(f"GPU {index} does not answer: {error}")
    return found
