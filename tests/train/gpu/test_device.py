"""Which device a rank takes, and what it says where that device cannot be used, or is full."""

import pytest
import torch

from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.launch import environment
from engine.launch.environment import ranks_per_node, torch_is_built_for_gpus
from engine.train.distributed.ranks import RankGroup
from engine.train.worker import failed_message, is_slow_dtype


@pytest.fixture
def unusable_gpu(monkeypatch):
    """The driver counts a GPU, but torch cannot use it, as with a driver that is too old."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_that_torch_cannot_use_is_an_error_where_a_gpu_is_asked_for(unusable_gpu):
    with pytest.raises(UserInputError, match="torch cannot use the GPUs here"):
        RankGroup(LaunchConfig(device="cuda"))


def test_a_gpu_that_torch_cannot_use_is_left_to_a_single_rank_with_a_warning(unusable_gpu, caplog):
    assert RankGroup(LaunchConfig()).device.type == "cpu"
    assert "training on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("device", "dtype", "weights", "slow"),
    [
        ("cuda", "float32", 500_000_000, True),
        ("cuda", "float32", 4_000_000, False),
        ("cuda", "bfloat16", 500_000_000, False),
        ("cpu", "float32", 500_000_000, False),
    ],
)
def test_float32_is_slow_for_a_model_on_a_gpu_that_is_not_small(device, dtype, weights, slow):
    assert is_slow_dtype(torch.device(device), dtype, weights) == slow


def test_gpus_that_a_scheduler_has_not_assigned_are_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserInputError, match=r"launch\.gpus: none of 2, 3"):
        RankGroup(LaunchConfig(gpus=[2, 3]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
        RuntimeError(
            "NCCL error in: x.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=["gpu", "nccl", "host"],
)
def test_running_out_of_memory_is_reported_with_what_would_help_and_not_tried_again(error):
    failed = failed_message(error, None, 0)
    assert failed.final
    assert not failed.echo
    assert failed.text.startswith("out of memory: ")
    assert "ppo.micro_batch_size" in failed.text
    assert "\n" not in failed.text


def test_a_torch_for_cpus_gets_one_rank_on_a_machine_with_gpus(monkeypatch):
    monkeypatch.setattr(environment, "gpu_count", lambda: 4)
    built = torch.version.cuda is not None or torch.version.hip is not None
    assert torch_is_built_for_gpus() == built
    assert ranks_per_node(LaunchConfig()) == (4 if built else 1)
