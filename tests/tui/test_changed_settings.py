"""Comparisons of runs have settings that were changed while they trained."""

import json

from click.testing import CliRunner

from engine.launch.start import fork
from engine.session.checkpoints import checkpoint_path
from rlhf_tui.cli import cli


def test_diff_compares_settings_that_were_changed_during_a_run(session_maker, tmp_path):
    session_maker(tmp_path, "kept", 10)
    session_maker(tmp_path, "steered", 70)  # beta is set at step 63
    words = ["--sessions", str(tmp_path), "diff", "kept", "steered"]
    lines = [" ".join(line.split()) for line in CliRunner().invoke(cli, words).output.splitlines()]
    assert "kl.beta @ last step 0.05 0.08" in lines
    assert not any(line.startswith("kl.target") for line in lines)
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).output)
    assert found["settings"] == {"kl.beta": [0.05, 0.08]}


def test_diff_compares_a_fork_that_has_not_trained_by_the_settings_of_its_checkpoint(
    session_maker, tmp_path
):
    source = session_maker(tmp_path, "source", 70)
    folder = checkpoint_path(source.checkpoints, 50)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"settings": {"beta": 0.3}}}))
    (folder / "COMPLETE").touch()
    fork(source, "child", from_step=50, reseed=False, overrides=[], who="me")
    words = ["--sessions", str(tmp_path), "diff", "source", "child", "--json"]
    found = json.loads(CliRunner().invoke(cli, words).output)
    assert found["settings"] == {"kl.beta": [0.08, 0.3]}


def test_a_report_of_two_runs_compares_settings_that_were_changed(session_maker, tmp_path):
    session_maker(tmp_path, "kept", 10)
    session_maker(tmp_path, "steered", 70)  # beta is set at step 63
    page = tmp_path / "page.md"
    words = ["--sessions", str(tmp_path), "report", "kept", "--diff", "steered", "-o", str(page)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert "| kl.beta @ last step | 0.05 | 0.08 |" in page.read_text()
