"""How ranks are started."""

from engine.config import LaunchConfig
from engine.launcher import environment


def test_what_another_launcher_says_of_its_ranks_does_not_reach_ours(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    given = environment(LaunchConfig())
    assert "WORLD_SIZE" not in given
    assert "LOCAL_RANK" not in given
    assert "PATH" in given
