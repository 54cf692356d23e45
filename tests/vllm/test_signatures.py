"""The calls for GPUs, which are never run here, have the arguments that vLLM takes."""

import subprocess
from pathlib import Path

from engine.launch.rollout.engine import TESTED_VLLM, find_vllm, rollout_environment
from tests.vllm.conftest import CONFIG, PYTHON, START


def test_the_calls_for_gpus_fit_the_installed_vllm():
    script = Path(__file__).with_name("signatures.py")
    done = subprocess.run(
        [PYTHON, script], env=rollout_environment(CONFIG), capture_output=True, text=True,
        timeout=START, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["6", "calls"]


def test_the_installed_vllm_is_the_one_that_is_tested():
    assert find_vllm(PYTHON).split()[-1].startswith(f"{TESTED_VLLM}.")
