"""Which GPUs the ranks get, and what their driver says of them."""

import gc
import importlib.metadata
import os
import types

import pynvml
import pytest

from engine.config.sections.launch import LaunchConfig
from engine.launch import environment
from engine.launch.environment import rank_environment
from engine.memory.capacity import of_device, of_gpus
from engine.monitoring.telemetry import GpuReader, busy_gpus, gpu_count
from engine.nvml import silent_gpus

GB = 10**9


@pytest.fixture
def driver(monkeypatch):
    """A driver with three GPUs, the second one full; a part of a GPU supports few queries."""

    def unsupported(_handle, *_, **_named):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def by_index(index):
        if index >= 3:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def by_identifier(identifier):
        if not identifier.startswith("MIG-"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return identifier

    def memory(handle, version=None):
        """The first version of the query counts what the driver keeps for itself as used."""
        own = 0 if version else GB
        used = (9 if handle == 1 else 0) * GB
        return types.SimpleNamespace(used=used + own, total=80 * GB, free=79 * GB - used)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": by_index,
        "nvmlDeviceGetHandleByUUID": by_identifier,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}{handle}{handle}",
        "nvmlDeviceGetIndex": lambda handle: handle if isinstance(handle, int) else unsupported(0),
        "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceGetUtilizationRates": unsupported,
        "nvmlDeviceGetTemperature": lambda _handle, _sensor: 50,
        "nvmlDeviceGetPowerUsage": unsupported,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    gc.collect()  # readers close the driver, which is this one until here


@pytest.fixture
def default_allocator(monkeypatch):
    """An environment in which the user has not configured torch's allocator; an early torch."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "torch_version", lambda: (2, 9))


def test_the_allocator_grows_its_segments_unless_the_user_has_configured_it(
    default_allocator, monkeypatch
):
    assert rank_environment(LaunchConfig())["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(LaunchConfig(device="cpu"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # read before the other
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(LaunchConfig())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert rank_environment(LaunchConfig())["PYTORCH_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_a_container_image_does_not_round_the_float32_products_of_ranks(monkeypatch):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in rank_environment(LaunchConfig())


@pytest.mark.parametrize(
    ("version", "exact"),
    [("2.9.1+cu128", False), ("2.13.0+cpu", True), ("?", False)],
)
def test_pinned_memory_is_not_rounded_up_where_torch_can_be_told(monkeypatch, version, exact):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _package: version)
    settings = rank_environment(LaunchConfig())["PYTORCH_ALLOC_CONF"].split(",")
    assert ("pinned_max_round_threshold_mb:1" in settings) == exact


@pytest.mark.parametrize("kernel", ["5.15.90.1-microsoft-standard-WSL2", "5.15.148-tegra"])
def test_segments_do_not_grow_where_drivers_fail_at_that(default_allocator, monkeypatch, kernel):
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=kernel))
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(LaunchConfig())


def test_a_gpu_is_shown_without_the_fields_that_it_does_not_support(driver):
    gpus = GpuReader().read()
    assert [g.index for g in gpus] == [0, 1, 2]
    assert gpus[1].memory_used == 9 * GB
    assert gpus[1].temperature == 50.0
    assert gpus[1].power is None
    assert gpus[1].utilisation is None


def fail(monkeypatch, name, error, *, for_handle=None):
    """Makes a query of the driver fail, for one GPU or for all."""
    query = getattr(pynvml, name)

    def failing(*given, **named):
        if for_handle is None or given[:1] == (for_handle,):
            raise pynvml.NVMLError(error)
        return query(*given, **named)

    monkeypatch.setattr(pynvml, name, failing)


def test_a_gpu_that_fails_during_a_run_is_left_out_and_logged_once(driver, monkeypatch, caplog):
    reader = GpuReader()
    fail(monkeypatch, "nvmlDeviceGetName", pynvml.NVML_ERROR_GPU_IS_LOST, for_handle=1)
    for _ in range(2):
        assert [g.index for g in reader.read()] == [0, 2]
    assert [r.getMessage() for r in caplog.records] == ["GPU 1 does not answer: GPU is lost"]
    caplog.clear()  # the error in a record holds the reader


def test_a_gpu_that_has_failed_hides_no_other(driver, monkeypatch):
    lost = pynvml.NVML_ERROR_GPU_IS_LOST
    fail(monkeypatch, "nvmlDeviceGetHandleByIndex", lost, for_handle=0)
    assert [g.index for g in GpuReader().read()] == [1, 2]
    assert gpu_count() == 2
    assert silent_gpus() == ["GPU 0 does not answer: GPU is lost"]
    assert of_gpus([]).gpus == 2


def test_an_old_driver_counts_its_own_memory_as_used(driver, monkeypatch):
    new = pynvml.nvmlDeviceGetMemoryInfo

    def old(handle, version=None):
        if version:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return new(handle)

    assert [g.memory_used // GB for g in GpuReader().read()] == [0, 9, 0]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", old)
    assert [g.memory_used // GB for g in GpuReader().read()] == [1, 10, 1]


def test_a_gpu_that_uses_the_hosts_memory_is_shown_and_planned_with_the_hosts(driver, monkeypatch):
    fail(monkeypatch, "nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert [g.memory_total for g in GpuReader().read()] == [0, 0, 0]
    assert of_device("cuda", []).device == "cpu"


def test_capacity_is_that_of_the_smallest_and_of_the_fullest_chosen_gpu(driver, monkeypatch):
    sizes = {0: (80, 79), 1: (48, 47), 2: (80, 10)}

    def memory(handle, **_):
        total, free = sizes[handle]
        return types.SimpleNamespace(total=total * GB, free=free * GB)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    for chosen, (total, free) in {(): (48, 10), (0, 2): (80, 10), (0,): (80, 79)}.items():
        found = of_gpus(list(chosen))
        assert (found.total, found.free, found.gpus) == (total * GB, free * GB, len(chosen) or 3)
    assert of_gpus([7]) is None


def test_of_gpus_that_are_divided_only_the_first_part_is_used(driver, monkeypatch):
    def part(gpu, index):
        if (gpu, index) != (1, 2):  # the others of seven places are empty
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "MIG of 1"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", lambda gpu: [int(gpu == 1), 0])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxMigDeviceCount", lambda _gpu: 7)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", part)
    assert [g.name for g in GpuReader().read()] == ["card MIG of 1"]
    assert gpu_count() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert [g.name for g in GpuReader().read()] == ["card MIG-1"]
    assert gpu_count() == 1


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,0", ["card 2", "card 0"]),
        ("MIG-1", ["card MIG-1"]),
        ("GPU-2,GPU-00,GPU-9", ["card 2", "card 0"]),
        ("1,-1,2", ["card 1"]),
        ("1,5", ["card 1"]),
        ("", []),
    ],
)
def test_only_the_gpus_that_a_scheduler_assigned_are_used_and_shown(
    driver, monkeypatch, visible, names
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [g.name for g in GpuReader().read()] == names
    assert gpu_count() == len(names)


def test_a_gpu_that_others_fill_is_named_if_it_is_one_of_the_runs(driver):
    assert busy_gpus([]) == busy_gpus([1, 2]) == ["GPU 1 (card 1) already holds 9.0 GB"]
    assert busy_gpus([0, 2]) == []
    assert busy_gpus([0, 1], first=1) == []  # of another's, on a machine that is shared


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, [1, 2], "1,2"),
        ("2,3", [3], "3"),
        ("2,3", [0], ""),
        ("GPU-a,GPU-b", [1], "GPU-b"),
        ("2,3", [], "2,3"),
    ],
)
def test_launch_gpus_are_chosen_among_those_that_a_scheduler_assigned(
    monkeypatch, visible, gpus, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = rank_environment(LaunchConfig(gpus=gpus))
    assert found["CUDA_VISIBLE_DEVICES"] == expected
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
