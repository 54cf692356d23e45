"""How ranks are started."""

import signal
import subprocess

import pytest

from engine.config import LaunchConfig
from engine.launcher import command, environment
from engine.protocol import JOINED_VARIABLE, PARENT_VARIABLE, STORE_VARIABLE


def test_what_another_launcher_says_of_its_ranks_does_not_reach_ours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    given = environment(LaunchConfig())
    assert "WORLD_SIZE" not in given
    assert "LOCAL_RANK" not in given
    assert "PATH" in given


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_whose_parent_died_while_they_were_loading_end_at_once(tmp_path, count):
    another = {PARENT_VARIABLE: "1", STORE_VARIABLE: "tcp:127.0.0.1:1", JOINED_VARIABLE: "1"}
    launch = LaunchConfig()
    process = subprocess.Popen(
        command(launch, str(tmp_path), count), env=environment(launch) | another
    )
    assert process.wait(60) == -signal.SIGKILL
