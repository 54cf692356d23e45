"""Which GPUs the ranks get, and what their driver says of them."""

import types

import pynvml
import pytest

from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import rank_environment
from engine.monitoring.telemetry import Sampler, busy_gpus, gpu_count

GB = 10**9


@pytest.fixture
def driver(monkeypatch):
    """A driver with three GPUs, the second one full; a part of a GPU supports few queries."""

    def unsupported(_handle, *_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": int,
        "nvmlDeviceGetHandleByUUID": lambda identifier: identifier,
        "nvmlDeviceGetIndex": lambda handle: handle if isinstance(handle, int) else unsupported(0),
        "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(
            used=(9 if handle == 1 else 0) * GB, total=80 * GB, free=71 * GB
        ),
        "nvmlDeviceGetUtilizationRates": unsupported,
        "nvmlDeviceGetTemperature": lambda _handle, _sensor: 50,
        "nvmlDeviceGetPowerUsage": unsupported,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_allocator_grows_its_segments_unless_the_user_has_configured_it(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert rank_environment(LaunchConfig())["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(LaunchConfig(device="cpu"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # read before the other
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(LaunchConfig())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert rank_environment(LaunchConfig())["PYTORCH_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_a_container_image_does_not_round_the_float32_products_of_ranks(monkeypatch):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in rank_environment(LaunchConfig())


def test_a_gpu_is_shown_without_the_fields_that_it_does_not_support(driver, tmp_path):
    gpus = Sampler(tmp_path).sample({}, {}).gpus
    assert [g.index for g in gpus] == [0, 1, 2]
    assert gpus[1].memory_used == 9 * GB
    assert gpus[1].temperature == 50.0
    assert gpus[1].power is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [("2,0", ["card 2", "card 0"]), ("MIG-1", ["card MIG-1"]), ("1,-1,2", ["card 1"]), ("", [])],
)
def test_only_the_gpus_that_a_scheduler_assigned_are_used_and_shown(
    driver, tmp_path, monkeypatch, visible, names
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [g.name for g in Sampler(tmp_path).sample({}, {}).gpus] == names
    assert gpu_count() == len(names)


def test_a_gpu_that_others_fill_is_named_if_it_is_one_of_the_runs(driver):
    assert busy_gpus([]) == busy_gpus([1, 2]) == ["GPU 1 (card 1) already holds 9.0 GB"]
    assert busy_gpus([0, 2]) == []


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
