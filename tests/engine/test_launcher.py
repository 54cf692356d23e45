"""The environment and the start of ranks."""

import signal
import subprocess

import pytest

from engine.config.schema import LaunchConfig
from engine.launch.environment import (
    JOINED_VARIABLE,
    PARENT_VARIABLE,
    STORE_VARIABLE,
    rank_command,
    rank_environment,
)


def test_variables_of_another_launcher_do_not_reach_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    environment = rank_environment(LaunchConfig())
    assert "WORLD_SIZE" not in environment
    assert "LOCAL_RANK" not in environment
    assert "PATH" in environment


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_end_if_their_parent_dies_while_they_load(tmp_path, count):
    another = {PARENT_VARIABLE: "1", STORE_VARIABLE: "tcp:127.0.0.1:1", JOINED_VARIABLE: "1"}
    launch = LaunchConfig()
    process = subprocess.Popen(
        rank_command(launch, str(tmp_path), count), env=rank_environment(launch) | another
    )
    assert process.wait(240) == -signal.SIGKILL
