"""Completion of commands by the shell."""

import os
import shutil
import subprocess

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


@pytest.fixture
def values(root, monkeypatch):
    """What is completed after some words."""
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(root))
    completion = ShellComplete(cli, {}, "rlhf-tui", "_RLHF_TUI_COMPLETE")
    return lambda words, begun="": [c.value for c in completion.get_completions(words, begun)]


def test_descriptions_of_commands_are_whole():
    completion = ShellComplete(cli, {}, "rlhf-tui", "_RLHF_TUI_COMPLETE")
    described = {c.value: c.help for c in completion.get_completions([], "")}
    assert described["run"] == "Start a run from a configuration file in YAML."
    assert not any(text.endswith("...") for text in described.values())


@pytest.mark.parametrize(
    "words",
    [
        ["ctl", "frozen", "rollback"],
        ["ctl", "frozen", "delete-checkpoint"],
        ["resume", "frozen", "--from"],
        ["fork", "frozen", "--from"],
        ["eval", "frozen", "--step"],
        ["export", "frozen", "--step"],
    ],
)
def test_where_a_command_takes_a_checkpoint_its_steps_are_completed(values, root, words):
    for step in (5, 10):
        folder = root / "frozen" / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)  # the session may have one
        (folder / "COMPLETE").touch()
    assert values(words) == ["last", "best", "10", "5"]
    assert values(words, "1") == ["10"]


def test_set_completes_the_settings_that_can_change_during_a_run(values):
    assert values(["ctl", "frozen", "set"], "lea") == ["learning_rate="]
    assert values(["ctl", "frozen", "set", "epochs=2"], "lea") == ["learning_rate="]


def test_an_override_is_completed_by_the_keys_of_a_configuration(values):
    assert values(["run", "run.yaml", "-o"], "kl.beta_") == ["kl.beta_min=", "kl.beta_max="]


def test_after_a_command_that_does_not_exist_completion_prints_no_error(values):
    assert values(["stats"], "fro") == []


def test_fish_takes_descriptions_with_commas_as_they_are():
    script = CliRunner().invoke(cli, ["completion", "fish"]).output
    assert 'string split --max 1 "," $completion' in script
    assert 'string split ","' not in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_bare_shell_loads_its_script_without_a_message(tmp_path, shell):
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(CliRunner().invoke(cli, ["completion", shell]).output)
    bare = {"bash": "--norc", "zsh": "-f", "fish": "--no-config"}[shell]
    environment = {**os.environ, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
    done = subprocess.run(
        [program, bare, "-c", f". {script}"], env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_by_the_variable_that_the_program_reads(shell):
    script = CliRunner().invoke(cli, ["completion", shell]).output
    assert f"_RLHF_TUI_COMPLETE={shell}_complete" in script
