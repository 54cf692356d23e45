"""What `doctor` says of GPUs and their driver."""

import json

import pynvml
import pytest
from click.testing import CliRunner

from rlhf_tui.cli import cli
from rlhf_tui.commands import doctor


@pytest.fixture
def driver(monkeypatch):
    """A driver for CUDA 12.4 with eight GPUs, and a torch that is built for the same CUDA."""
    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 8,
        "nvmlDeviceGetHandleByIndex": int,
        "nvmlDeviceGetMigMode": lambda _gpu: [0, 0],
        "nvmlDeviceGetMaxMigDeviceCount": lambda _gpu: 0,
        "nvmlDeviceGetName": lambda _gpu: "NVIDIA H100 80GB HBM3",
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
        "nvmlSystemGetCudaDriverVersion": lambda: 12040,
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "torch_is_built_for_gpus", lambda: True)
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: (12, 8))


def examined(folder):
    """The exit code, the lines for people by their first word, and the problems."""
    words = ["doctor", "--sessions", str(folder)]
    printed = CliRunner().invoke(cli, words)
    lines = dict(line.split(maxsplit=1) for line in printed.output.splitlines())
    problems = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["problems"]
    assert printed.exit_code == bool(problems)
    return lines, problems


def failing(error):
    def query(*_):
        raise pynvml.NVMLError(error)

    return query


def test_equal_gpus_are_counted_and_the_driver_has_its_version(driver, tmp_path):
    lines, problems = examined(tmp_path)
    assert lines["gpus"] == "8 × NVIDIA H100 80GB HBM3"
    assert lines["driver"] == "550.54.15, for CUDA up to 12.4"
    assert problems == []


def test_a_driver_too_old_for_torch_is_a_problem(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: (13, 0))
    _, (problem,) = examined(tmp_path)
    assert problem.startswith("torch is built for CUDA 13.0 and the driver is for CUDA up to 12.4")
    assert problem.endswith("install a build of torch for CUDA 12")


def test_a_torch_for_cpus_beside_gpus_is_a_problem(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "torch_is_built_for_gpus", lambda: False)
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: None)
    _, (problem,) = examined(tmp_path)
    assert problem.startswith("there is a GPU but torch is a CPU build")


def test_a_gpu_that_has_failed_is_a_problem_and_hides_no_other(driver, tmp_path, monkeypatch):
    def name(gpu):
        return failing(pynvml.NVML_ERROR_GPU_IS_LOST)() if gpu == 3 else "NVIDIA H100"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", name)
    lines, problems = examined(tmp_path)
    assert lines["gpus"] == "7 × NVIDIA H100"
    assert problems == ["GPU 3 does not answer: GPU is lost"]


@pytest.mark.parametrize(
    ("error", "shown", "is_problem"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "none", False),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "does not answer: Driver Not Loaded", False),
        (
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            "does not answer: RM has detected an NVML/RM version mismatch.",
            True,
        ),
    ],
)
def test_why_the_driver_does_not_answer_is_shown(
    driver, tmp_path, monkeypatch, error, shown, is_problem
):
    monkeypatch.setattr(pynvml, "nvmlInit", failing(error))
    lines, problems = examined(tmp_path)
    assert (lines["gpus"], lines["driver"]) == ("none", shown)
    assert [p.endswith("reboot") for p in problems] == [True] * is_problem
