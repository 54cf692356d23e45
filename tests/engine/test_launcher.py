"""The environment and the start of ranks."""

import os
import signal
import subprocess
import sys

import pytest

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.rollout import RolloutConfig
from engine.launch.environment import (
    JOINED_VARIABLE,
    STORE_VARIABLE,
    rank_command,
    rank_environment,
)
from engine.launch.parent_death import PARENT_VARIABLE
from engine.launch.rollout.engine import engine_environment
from engine.launch.rollout.relay import relay_environment
from tests.waiting import is_running, until


def test_variables_of_another_launcher_do_not_reach_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    environment = rank_environment(LaunchConfig())
    assert "WORLD_SIZE" not in environment
    assert "LOCAL_RANK" not in environment
    assert "PATH" in environment


def test_docstrings_which_transformers_reads_are_not_dropped_in_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    printed = subprocess.run(
        [sys.executable, "-c", "import json; print(__debug__, json.__doc__ is not None)"],
        env=rank_environment(LaunchConfig()), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert printed.stdout == b"False True\n"


@pytest.mark.parametrize(
    "environment",
    [
        lambda: rank_environment(LaunchConfig()),
        lambda: engine_environment(LaunchConfig(), RolloutConfig(), 0),
        lambda: relay_environment("a secret"),
    ],
    ids=["rank", "rollout engine", "relay"],
)
def test_what_writes_a_log_prints_utf_8_in_any_locale(monkeypatch, environment):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    printed = subprocess.run(
        [sys.executable, "-c", "print('\\u2192 \\ud800')"], env=environment(),
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert printed.stdout == "\u2192 \\ud800\n".encode()


def test_triton_finds_nothing_left_when_a_rank_exits(tmp_path):
    (tmp_path / "triton.py").write_text(
        "import os\n"
        "class Type:\n"
        "    def __del__(self): os.write(1, b'freed')\n"
        "in_a_cycle = Type()\n"
        "in_a_cycle.itself = in_a_cycle\n"
    )
    (tmp_path / "program.py").write_text("import triton\ndef main(): pass\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-m", "engine.launch.rank", "program"], cwd=tmp_path,
        env=rank_environment(LaunchConfig()) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, timeout=120, check=True,
    )  # fmt: skip
    assert ended.stdout == b"freed"


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_end_if_their_parent_dies_while_they_load(tmp_path, count):
    another = {PARENT_VARIABLE: "1", STORE_VARIABLE: "tcp:127.0.0.1:1", JOINED_VARIABLE: "1"}
    launch = LaunchConfig()
    process = subprocess.Popen(
        rank_command(launch, str(tmp_path), count), env=rank_environment(launch) | another
    )
    assert process.wait(240) == -signal.SIGKILL


def test_a_rank_whose_supervisor_is_killed_while_it_imports_ends_at_once(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nopen('began', 'w')\ntime.sleep(600)\n")
    supervisor = (
        "import os, subprocess, sys, time, pathlib\n"
        f"os.environ['{PARENT_VARIABLE}'] = str(os.getpid())\n"
        "rank = subprocess.Popen([sys.executable, '-m', 'engine.launch.rank', 'slow'])\n"
        "while not pathlib.Path('began').exists(): time.sleep(0.05)\n"
        "print(rank.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", supervisor], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    rank = int(ended.stdout)
    until(lambda: not is_running(rank), "end of the rank", seconds=60)  # it would sleep for 600
