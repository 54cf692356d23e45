"""How ranks are started."""

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


def test_what_another_launcher_says_of_its_ranks_does_not_reach_ours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    given = rank_environment(LaunchConfig())
    assert "WORLD_SIZE" not in given
    assert "LOCAL_RANK" not in given
    assert "PATH" in given


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_whose_parent_died_while_they_were_loading_end_at_once(tmp_path, count):
    another = {PARENT_VARIABLE: "1", STORE_VARIABLE: "tcp:127.0.0.1:1", JOINED_VARIABLE: "1"}
    launch = LaunchConfig()
    process = subprocess.Popen(
        rank_command(launch, str(tmp_path), count), env=rank_environment(launch) | another
    )
    assert process.wait(60) == -signal.SIGKILL
