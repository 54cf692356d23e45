"""Completion of commands by the shell."""

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from rlhf_tui.cli import cli


def test_a_shell_completes_commands_and_names_of_sessions(root, monkeypatch):
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(root))
    completion = ShellComplete(cli, {}, "rlhf-tui", "_RLHF_TUI_COMPLETE")
    assert "status" in [c.value for c in completion.get_completions([], "sta")]
    for words in (["status"], ["reward", "train"], ["reward", "agreement"]):
        assert [c.value for c in completion.get_completions(words, "fro")] == ["frozen"]


def test_a_folder_whose_name_would_be_a_command_is_not_completed(tmp_path, monkeypatch):
    for name in ("run", "run;rm x", "run$(id)"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path))
    completion = ShellComplete(cli, {}, "rlhf-tui", "_RLHF_TUI_COMPLETE")
    assert [c.value for c in completion.get_completions(["status"], "r")] == ["run"]


def test_fish_takes_descriptions_with_commas_as_they_are():
    script = CliRunner().invoke(cli, ["completion", "fish"]).output
    assert 'string split --max 1 "," $completion' in script
    assert 'string split ","' not in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_by_the_variable_that_the_program_reads(shell):
    script = CliRunner().invoke(cli, ["completion", shell]).output
    assert f"_RLHF_TUI_COMPLETE={shell}_complete" in script
