"""Which device a rank takes, and what it says where that device cannot be used, or is full."""

import json
import os
import types

import pynvml
import pytest
import torch
import torch.distributed as dist

from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.launch import environment
from engine.launch.environment import STORE_VARIABLE, ranks_per_node, torch_is_built_for_gpus
from engine.memory.capacity import Capacity
from engine.protocol.rank_messages import Begin, Placed
from engine.train.distributed import ranks
from engine.train.distributed.ranks import RankGroup
from engine.train.failure import failed_message
from engine.train.load_checks import check_device
from engine.train.reports.setup_notes import dtype_note
from tests.train.gpu.pretend import GPU


@pytest.fixture
def unusable_gpu(monkeypatch):
    """The driver counts a GPU, but torch cannot use it, as with a driver that is too old."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_that_torch_cannot_use_is_an_error_where_a_gpu_is_asked_for(unusable_gpu):
    with pytest.raises(UserInputError, match="torch cannot use the GPUs here"):
        RankGroup(LaunchConfig(device="cuda"))


def test_a_gpu_that_torch_cannot_use_is_left_to_a_single_rank_with_a_warning(unusable_gpu, caplog):
    group = RankGroup(LaunchConfig())
    assert group.device.type == "cpu"
    assert group.device_note.startswith("training on the CPU: torch cannot use the GPUs here")
    assert group.device_note in caplog.text


def test_gpus_that_are_named_and_cannot_be_used_are_not_replaced_by_the_cpu(unusable_gpu):
    with pytest.raises(UserInputError, match="torch cannot use the GPUs here"):
        RankGroup(LaunchConfig(gpus=[0]))


@pytest.fixture
def usable_gpu(monkeypatch):
    """A GPU of compute capability 7.0, with a torch whose kernels are for some others."""

    def pretend(*architectures, capability=(7, 0)):
        for name, value in {
            "device_count": 1,
            "is_available": True,
            "init": None,
            "get_arch_list": list(architectures),
            "get_device_capability": capability,
            "get_device_name": "Tesla V100",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        # accelerate keeps the first device that it finds for the whole process.
        monkeypatch.setattr(ranks, "PartialState", device_of)

    def device_of(*, cpu):
        return types.SimpleNamespace(device=torch.device("cpu") if cpu else GPU)

    return pretend


@pytest.mark.parametrize(
    ("built_for", "capability", "usable"),
    [
        ("sm_75 sm_80 sm_90 compute_90", (7, 0), False),  # a build of later GPUs
        ("sm_70 sm_75", (7, 0), True),
        ("sm_80", (8, 9), True),  # a later one of the same major version
        ("sm_86", (8, 0), False),
        ("sm_80 sm_90", (12, 0), False),  # a GPU later than the build
        ("sm_80 compute_90", (12, 0), True),  # compiled for it by the driver
        ("sm_100 sm_120", (12, 1), True),
        ("sm_90a", (9, 0), True),
        ("", (7, 0), True),  # not known
    ],
)
def test_a_gpu_for_which_torch_has_no_kernels_cannot_be_used(
    usable_gpu, built_for, capability, usable
):
    usable_gpu(*built_for.split(), capability=capability)
    note = RankGroup(LaunchConfig()).device_note
    assert bool(note) != usable
    if not usable:
        assert "no kernels for Tesla V100, of compute capability" in note
        with pytest.raises(UserInputError, match=f"but for {built_for}"):
            RankGroup(LaunchConfig(device="cuda"))


def test_transfers_between_gpus_that_a_driver_does_not_support_are_switched_off(
    usable_gpu, monkeypatch
):
    usable_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(ranks, "check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    RankGroup(LaunchConfig())
    assert os.environ["NCCL_P2P_DISABLE"] == "0"  # as the user has set it
    assert os.environ.pop("NCCL_IB_DISABLE") == "1"


def test_each_of_several_ranks_tells_nccl_its_gpu(usable_gpu, monkeypatch, tmp_path):
    usable_gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv(STORE_VARIABLE, f"file:{tmp_path / 'store'}")
    first = dist.FileStore(str(tmp_path / "store"), 2)
    first.set("device/0", json.dumps([os.uname().nodename, True, ""]))
    asked = {}
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **named: asked.update(named, backend=backend)
    )
    monkeypatch.setattr(dist, "new_group", lambda **named: named["backend"])
    group = RankGroup(LaunchConfig(timeout=7.0))
    assert group.device == GPU
    assert asked["backend"] == "cuda:nccl,cpu:gloo"
    assert asked["device_id"] == torch.device("cuda", 1)
    assert (asked["rank"], asked["world_size"], asked["timeout"].seconds) == (1, 2, 7)
    assert (group.group, group.checkpoint_group) == ("gloo", "gloo")


def test_more_ranks_than_gpus_are_an_error_that_names_their_number(usable_gpu, monkeypatch):
    usable_gpu()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserInputError, match=r"3 ranks .* torch sees 1 GPU here: use"):
        RankGroup(LaunchConfig(processes=3))


@pytest.fixture
def torch_for_cpus(monkeypatch):
    """A build of torch without CUDA, on a machine that has a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, None)
    capacity = Capacity(device="cuda", total=1, free=1, gpus=1)
    monkeypatch.setattr(ranks, "of_gpus", lambda _chosen: capacity)


def test_a_torch_for_cpus_on_a_machine_with_a_gpu_is_noted(torch_for_cpus):
    assert "built for CPUs only" in RankGroup(LaunchConfig()).device_note
    assert RankGroup(LaunchConfig(device="cpu")).device_note == ""
    with pytest.raises(UserInputError, match="built for CPUs only"):
        RankGroup(LaunchConfig(device="cuda"))


def test_a_driver_that_does_not_answer_is_noted(torch_for_cpus, monkeypatch):
    """As after an update of the driver: torch finds no GPU then, and says nothing."""

    def mismatch():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(pynvml, "nvmlInit", mismatch)
    assert "driver does not answer" in RankGroup(LaunchConfig()).device_note
    with pytest.raises(UserInputError, match="after an update of it, reboot"):
        RankGroup(LaunchConfig(device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU is wanted
    assert RankGroup(LaunchConfig()).device_note == ""


def test_a_run_on_a_gpu_that_is_gone_does_not_go_on_on_the_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    before = Placed(ranks=1, strategy="ddp", device="cuda")
    with pytest.raises(UserInputError, match=r"launch\.device=cpu"):
        check_device(before, cpu)
    check_device(before, gpu)
    check_device(None, cpu)
    check_device(Placed(ranks=1, strategy="ddp", device="cpu"), gpu)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_restart_on_the_cpu_must_be_asked_for_after_a_gpu(make_run, device):
    before = Placed(ranks=1, strategy="ddp", device="cuda:0")
    keys = {"begin": Begin(attempt=2, from_step=0, placed=before), "device": torch.device("cpu")}
    if device == "cpu":
        assert make_run("launch.device=cpu", **keys)
        return
    with pytest.raises(UserInputError, match="computed on a GPU before"):
        make_run("launch.device=auto", **keys)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "weights", "noted"),
    [
        ("cuda", (9, 0), "float32", 500_000_000, "model.dtype is float32"),
        ("cuda", (9, 0), "float32", 4_000_000, ""),
        ("cuda", (9, 0), "bfloat16", 500_000_000, ""),
        ("cuda", (7, 5), "bfloat16", 500_000_000, "model.dtype is bfloat16"),
        ("cuda", (7, 5), "bfloat16", 4_000_000, ""),
        ("cpu", None, "float32", 500_000_000, ""),
    ],
)
def test_a_dtype_that_is_slow_on_a_gpu_is_noted(
    monkeypatch, device, capability, dtype, weights, noted
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    text = dtype_note(torch.device(device), dtype, weights)
    assert text[: len(noted) or None] == noted


def test_gpus_that_a_scheduler_has_not_assigned_are_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserInputError, match=r"none of 2, 3 is among those in CUDA_VISIBLE"):
        RankGroup(LaunchConfig(gpus=[2, 3]))


def test_gpus_that_do_not_exist_are_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(UserInputError, match=r"launch\.gpus: none of 5 is here"):
        RankGroup(LaunchConfig(gpus=[5]))
    assert RankGroup(LaunchConfig(gpus=[5], device="cpu")).device.type == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
        RuntimeError(
            "NCCL error in: x.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("CUDA driver error: out of memory"),  # of an expandable segment
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=["gpu", "nccl", "driver", "host"],
)
def test_running_out_of_memory_is_reported_with_what_would_help_and_not_tried_again(error):
    failed = failed_message(error, None, 0)
    assert failed.final
    assert not failed.echo
    assert failed.text.startswith("out of memory: ")
    assert "ppo.micro_batch_size" in failed.text
    assert "\n" not in failed.text


def test_a_gpus_error_is_told_without_the_advice_for_writers_of_kernels():
    error = torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be "
        "asynchronously reported at some other API call\n"
    )
    failed = failed_message(error, None, 0)
    assert failed.text == "AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    assert "asynchronously" in failed.traceback
    assert not failed.final  # a restart finds out whether the GPU works again


def test_a_torch_for_cpus_gets_one_rank_on_a_machine_with_gpus(monkeypatch):
    monkeypatch.setattr(environment, "gpu_count", lambda: 4)
    built = torch.version.cuda is not None or torch.version.hip is not None
    assert torch_is_built_for_gpus() == built
    assert ranks_per_node(LaunchConfig()) == (4 if built else 1)
