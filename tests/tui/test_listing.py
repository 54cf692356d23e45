"""What `ls`, `status` and `metrics` print."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.journal.fork import copy_until
from engine.journal.writer import JournalWriter
from engine.session.checkpoints import checkpoint_path, mark_complete
from engine.session.folder import create
from rlhf_tui.cli import cli
from rlhf_tui.state.runs.listing import SessionListCache
from rlhf_tui.state.runs.session_row import read_session_row

DEADLINE = 240.0


def test_no_two_columns_of_the_metrics_have_one_title(root):
    arguments = ["metrics", "frozen", "--last", "1", "--sessions", str(root)]
    header = CliRunner().invoke(cli, arguments).output.splitlines()[0]
    titles = re.split("  +", header)
    assert len(titles) == len(set(titles))
    assert "step" in titles


def test_ls_has_the_kl_of_the_last_step(root):
    where = ["--sessions", str(root)]
    header, row = CliRunner().invoke(cli, ["ls", *where]).output.splitlines()
    kl = json.loads(CliRunner().invoke(cli, ["status", "frozen", "--json", *where]).output)["kl"]
    assert row[header.index("KL") :].split()[0] == f"{kl:.2f}"


def test_beta_is_not_known_while_a_fork_loads_its_checkpoint(session_maker, tmp_path):
    parent = session_maker(tmp_path / "sessions", "parent", 3)
    child = create(tmp_path / "sessions", "child", parent.config())
    copy_until(parent, child, 3)
    with contextlib.closing(JournalWriter(child)) as journal:
        journal.begin_attempt(3, fresh=False)
        assert read_session_row(child).beta is None
        journal.set_meta(settings={"beta": 0.07})  # as the engine does once it has loaded
        assert read_session_row(child).beta == 0.07


def test_status_tells_that_the_journal_of_a_session_with_checkpoints_is_missing(
    session_maker, tmp_path
):
    session = session_maker(tmp_path / "sessions", "run", 3)
    folder = checkpoint_path(session.checkpoints, 2)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    mark_complete(folder)
    session.journal_file.unlink()
    result = CliRunner().invoke(cli, ["status", "run", "--sessions", str(tmp_path / "sessions")])
    assert "the journal of its checkpoints is missing" in result.output.splitlines()[0]


def test_ls_marks_a_session_whose_configuration_is_cut_off(session_maker, tmp_path):
    session = session_maker(tmp_path / "sessions", "run", 3)
    text = session.config_file.read_text()
    session.config_file.write_text(text[: text.index("\nkl:") + 1])
    where = ["--sessions", str(tmp_path / "sessions")]
    (row,) = json.loads(CliRunner().invoke(cli, ["ls", "--json", *where]).output)
    assert row["state"] == "unreadable"
    assert "is cut off" in row["message"]


def test_a_listed_session_whose_configuration_is_cut_off_since_is_read_again(
    session_maker, tmp_path
):
    session, cache = session_maker(tmp_path, "run", 3), SessionListCache()
    for _ in range(2):  # a first reading may leave files of SQLite
        assert [listed.row.state for listed in cache.rows(tmp_path)] == ["finished"]
    session.config_file.write_text(session.config_file.read_text()[:100])
    assert [listed.row.state for listed in cache.rows(tmp_path)] == ["unreadable"]


@pytest.mark.parametrize("variables", [{"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_states_have_colours_on_a_terminal_unless_they_are_not_wanted(root, variables):
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_tui.cli", "ls", "--sessions", str(root)],
        stdout=slave, timeout=DEADLINE, check=True,
        env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | variables,
    )  # fmt: skip
    os.close(slave)
    printed = os.read(master, 10_000)
    os.close(master)
    assert done.returncode == 0
    assert (b"\x1b[" in printed) == ("NO_COLOR" not in variables)


def test_ls_says_why_a_session_cannot_be_read_beside_the_others(session_maker, tmp_path):
    root = tmp_path / "sessions"
    session_maker(root, "one", 3)
    lock = session_maker(root, "two", 3).lock_file
    lock.symlink_to(lock)
    states = {s.row.name: s.row.state for s in SessionListCache().rows(root)}
    assert states == {"one": "finished", "two": "unreadable"}
    rows = json.loads(CliRunner().invoke(cli, ["ls", "--json", "--sessions", str(root)]).output)
    assert "cannot tell whether an engine holds" in rows[1]["message"]


@pytest.mark.parametrize("mode", [0o744, 0o711, 0o700])
def test_a_folder_that_cannot_be_read_is_not_one_without_sessions(
    session_maker, tmp_path, monkeypatch, mode
):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # no live runs elsewhere
    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    session_maker(root, "one", 1)
    root.chmod(mode)
    os.seteuid(65534)
    try:
        result = CliRunner().invoke(cli, ["ls", "--json", "--sessions", str(root)])
    finally:
        os.seteuid(0)
        shutil.rmtree(root)
    assert f"cannot read {root}: Permission denied" in str(result.exception)


def test_a_file_is_not_a_folder_without_sessions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # no live runs elsewhere
    (tmp_path / "run.yaml").write_text("")
    result = CliRunner().invoke(cli, ["--sessions", str(tmp_path / "run.yaml"), "ls"])
    assert "is a file; --sessions takes a folder" in str(result.exception)
