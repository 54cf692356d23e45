"""The page on the Python API: its code is run, block by block, against a run that it starts."""

import re
from pathlib import Path

import pytest

from tests.e2e.lab import processes

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def own_sessions(tmp_path, monkeypatch):
    """A folder of sessions and a list of live ones of this test alone; processes end with it."""
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    for process in processes(tmp_path):
        process.kill()


@pytest.mark.slow
def test_the_code_of_the_page_does_what_the_page_says(own_sessions, capsys):
    names = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{PAGE}, block {number + 1}", "exec"), names)  # noqa: S102 - our own
    run, table = names["run"], names["table"]
    assert names["names"] == ["first"]
    assert names["kl"] > -1
    assert table["step"][:4].tolist() == [1, 2, 3, 4]
    assert len(table["objective/kl"]) == len(table["step"])
    assert len(names["scores"]) == len(names["curve"])
    scores = [s.score for s in names["best"]]
    assert scores == sorted(scores, reverse=True)
    assert names["saved"][0] == 2
    assert "epochs must be a whole number of at least 1, not -1" in capsys.readouterr().out
    assert names["state"] == run.state == "stopped"
    assert {c.command: c.status for c in run.commands()} == {
        "pause": "applied", "beta": "applied", "set": "rejected", "undo": "applied",
        "kl": "applied", "probe": "applied", "checkpoint": "applied", "note": "applied",
        "unpause": "applied", "rollback": "applied", "stop": "applied",
    }  # fmt: skip
    assert {c.who for c in run.commands()} == {"notebook"}
    assert run.settings()["beta"] == 0.4 or run.settings()["controller"] == "adaptive"
    assert names["other"].wait_for_end(60) == "stopped"
    assert names["other"].config().kl.beta == 0.4
