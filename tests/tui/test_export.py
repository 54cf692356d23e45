"""The command export: whole or not at all, and from damaged sessions as well."""

import hashlib
import shutil
import sys

import msgspec
import pytest
from click.testing import CliRunner

from engine.session.checkpoints import mark_complete
from rlhf_tui.cli import cli


def write_checkpoint(session, *files):
    """A whole checkpoint of step 3, whose policy has these files; returns the policy's folder."""
    policy = session.checkpoints / "step-000003" / "policy"
    policy.mkdir(parents=True)
    for name in files:
        (policy / name).write_text("{}")
    sums = {f"policy/{name}": hashlib.sha256(b"{}").hexdigest() for name in files}
    (policy.parent / "state.json").write_bytes(msgspec.json.encode({"hashes": sums}))
    mark_complete(policy.parent)
    return policy


@pytest.mark.parametrize("option", [("--step", "2"), ("--best",), ("--ema",), ("--merged",)])
def test_an_option_of_the_policy_is_refused_where_none_is_exported(session_maker, tmp_path, option):
    session_maker(tmp_path / "s", "mine", 3)
    target = tmp_path / "samples.jsonl"
    arguments = ["export", "mine", "--samples", str(target), "--sessions", str(tmp_path / "s")]
    done = CliRunner().invoke(cli, [*arguments, *option])
    assert option[0] in str(done.exception)
    assert not target.exists()


def test_an_export_of_nothing_is_told_what_there_is_to_export(session_maker, tmp_path):
    session_maker(tmp_path / "s", "mine", 3)
    done = CliRunner().invoke(cli, ["export", "mine", "--sessions", str(tmp_path / "s")])
    assert str(done.exception).endswith("--policy DIR, --samples FILE or --preferences FILE")


def test_an_exported_file_replaces_another_whole(session_maker, tmp_path):
    session_maker(tmp_path / "s", "mine", 3)
    target, same = tmp_path / "rows.jsonl", tmp_path / "same.jsonl"
    target.write_text("before", encoding="utf-8")
    same.hardlink_to(target)  # sees what is written in place
    arguments = ["export", "mine", "--samples", str(target), "--sessions", str(tmp_path / "s")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert target.read_text(encoding="utf-8") != "before"
    assert same.read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize("words", [("init", "-"), ("export", "mine", "--samples", "-")])
def test_a_dash_is_no_name_of_a_file(session_maker, tmp_path, monkeypatch, words):
    session_maker(tmp_path / "s", "mine", 3)
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path / "s"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words)
    assert str(done.exception).startswith("- does not stand for standard output here")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_policy_that_cannot_be_copied_whole_leaves_no_folder(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    policy = write_checkpoint(session, "config.json")
    (policy / "model.safetensors").symlink_to("nowhere")
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--policy", str(target), "--sessions", folder]
    done = CliRunner().invoke(cli, arguments)
    assert str(done.exception) == f"--policy: cannot write {target}: No such file or directory"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    (policy / "model.safetensors").unlink()
    target.mkdir()  # an empty folder is as good as none
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert {path.name for path in target.iterdir()} == {"README.md", "config.json"}


def test_an_error_of_a_merge_names_the_folder_that_was_given(session_maker, tmp_path, monkeypatch):
    session = session_maker(tmp_path / "s", "mine", 3)
    (session.checkpoints / "step-000003" / "policy").mkdir(parents=True)
    for name in ("state.json", "COMPLETE"):
        (session.checkpoints / "step-000003" / name).write_text("{}")
    config = session.config()
    lora = msgspec.structs.replace(config.lora, rank=4)
    session.write_config(msgspec.structs.replace(config, lora=lora))
    python = tmp_path / "python"  # in place of the process that imports torch
    python.write_text(
        '#!/bin/sh\nfor last; do :; done; echo "cannot write $last: full" >&2; exit 2\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--merged", "--policy", str(target)]
    done = CliRunner().invoke(cli, [*arguments, "--sessions", folder])
    assert str(done.exception) == f"cannot write {target}: full"


def test_a_policy_is_exported_from_a_session_whose_journal_is_damaged(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    write_checkpoint(session, "config.json")
    session.journal_file.write_bytes(b"no database" * 1000)
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--policy", str(target), "--sessions", folder]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0
    assert "without a card: cannot read" in done.output
    assert [path.name for path in target.iterdir()] == ["config.json"]


@pytest.mark.parametrize("removed", ["COMPLETE", "policy/model.safetensors"])
def test_a_policy_whose_checkpoint_is_deleted_meanwhile_is_not_exported(
    session_maker, tmp_path, monkeypatch, removed
):
    session = session_maker(tmp_path / "s", "mine", 3)
    checkpoint = write_checkpoint(session, "config.json", "model.safetensors").parent
    copy = shutil.copy2

    def copy_late(source, target):
        for name in ("COMPLETE", removed):
            (checkpoint / name).unlink(missing_ok=True)
        copy(source, target)

    monkeypatch.setattr(shutil, "copy2", copy_late)
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--policy", str(target), "--sessions", folder]
    done = CliRunner().invoke(cli, arguments)
    assert "has no checkpoint of step 3" in str(done.exception)
    assert not target.exists()


@pytest.mark.parametrize("damage", ["{]", "", None])
def test_a_damaged_policy_is_not_exported(session_maker, tmp_path, damage):
    session = session_maker(tmp_path / "s", "mine", 3)
    weights = write_checkpoint(session, "config.json", "model.safetensors") / "model.safetensors"
    weights.unlink() if damage is None else weights.write_text(damage)
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--policy", str(target), "--sessions", folder]
    done = CliRunner().invoke(cli, arguments)
    assert "the checkpoint of step 3 is damaged: policy/model.safetensors" in str(done.exception)
    assert not target.exists()


def test_damage_elsewhere_in_its_checkpoint_does_not_concern_a_policy(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    policy = write_checkpoint(session, "config.json")
    sums = {"policy/config.json": hashlib.sha256(b"{}").hexdigest(), "policy-ema/lost": "0"}
    (policy.parent / "state.json").write_bytes(msgspec.json.encode({"hashes": sums}))
    mark_complete(policy.parent)
    target, folder = tmp_path / "to", str(tmp_path / "s")
    arguments = ["export", "mine", "--step", "3", "--policy", str(target), "--sessions", folder]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
