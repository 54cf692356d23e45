"""What a fork takes from its source, and what refuses it."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.api.session_reader import SessionReader
from engine.errors import (
    ConfigError,
    NoSuchSessionError,
    SessionError,
    SessionLockedError,
    SessionNameError,
    UserInputError,
)
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.start import fork, resume
from engine.launch.start_checkpoints import (
    checkpoint_steps,
    has_history,
)
from engine.session.checkpoints import checkpoint_path
from engine.session.folder import SessionFolder
from engine.supervisor.processes import rank_processes
from engine.supervisor.serve import supervise
from engine.verification.verify import verify

FORK = """
import sys
from pathlib import Path
from engine.launch.start import fork
from engine.session.folder import SessionFolder
session = SessionFolder(Path(sys.argv[1]))
fork(session, "child", from_step=2, reseed=False, overrides=[], who="me")
"""


@pytest.mark.parametrize("copied", [1, 2])
def test_a_fork_that_is_killed_amid_its_copies_does_not_seem_to_have_made_the_steps_of_its_source(
    writer, tmp_path, copied, monkeypatch
):
    writer.steps(1, 2, 3, 4)
    writer.checkpoint(2)
    root = Path(__file__).parents[2]
    point = f"engine.journal.schema:migrate|after|{copied}|kill|{tmp_path / 'marker'}"
    done = subprocess.run(
        [sys.executable, "-c", FORK, writer.session.folder],
        env=os.environ | {"PYTHONPATH": f"{root}/tests/faults/hooks:{root}",
                          "RLHF_TUI_TEST_POINT": point},
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    child = SessionFolder(writer.session.folder.with_name("child"))
    assert checkpoint_steps(child) == [2]
    assert not has_history(child)
    with pytest.raises(UserInputError, match=r"its journal .* is missing"):
        resume(child, from_step=None, reseed=False, overrides=[], who="me")
    assert any("part.db" in finding.text for finding in verify(child).findings)
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: ["false"])
    start = resume(child, from_step=2, reseed=False, overrides=["launch.max_restarts=0"], who="me")
    assert asyncio.run(supervise(child, start)) == 1
    assert not [*child.folder.glob("part.db*")]


def end_amid_copies(session, number):
    """Starts to fork a session in a process that a signal ends; returns the fork."""
    ends = f"""
import os, signal
from engine.launch import start
def end(*_paths):
    os.kill(os.getpid(), {number})
    signal.pause()
start._link_or_copy = end
"""
    command = [sys.executable, "-c", ends + FORK, session.folder]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -number
    return SessionFolder(session.folder.with_name("child"))


def test_a_fork_that_is_killed_amid_its_checkpoint_does_not_begin_at_step_0(writer):
    writer.checkpoint(2)
    child = end_amid_copies(writer.session, signal.SIGKILL)
    with pytest.raises(UserInputError, match="not copied to the end"):
        resume(child, from_step=None, reseed=False, overrides=[], who="me")


def test_nothing_is_left_of_a_fork_that_is_interrupted(writer):
    writer.checkpoint(2)
    assert not end_amid_copies(writer.session, signal.SIGINT).folder.exists()


def test_a_fork_is_starting_until_its_engine_could_have_locked_it(writer):
    writer.steps(1, 2)
    writer.checkpoint(2)
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    with JournalReader(child) as reader:
        assert reader.state() == "starting"
        long_ago = time.time() - 60
        for file in (child.config_file, child.journal_file):
            os.utime(file, (long_ago, long_ago))
        assert reader.state() == "crashed"


def test_a_fork_that_has_not_trained_has_the_settings_of_its_checkpoint(writer):
    writer.steps(1, 2)
    writer.checkpoint(2)
    state = {"hashes": {}, "state": {"settings": {"beta": 0.3}}}
    path = checkpoint_path(writer.session.checkpoints, 2) / "state.json"
    path.write_text(json.dumps(state))
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert SessionReader(child.folder).settings()["beta"] == 0.3


def test_what_a_fork_has_copied_in_part_can_neither_be_resumed_nor_deleted(writer, monkeypatch):
    writer.checkpoint(2)
    copy, refused = shutil.copytree, []

    def copy_late(source, target, **options):
        child = SessionFolder(writer.session.folder.with_name("child"))
        with pytest.raises(SessionLockedError) as raised:
            child.acquire()
        refused.append(raised.value)
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", copy_late)
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert refused
    assert not child.is_live()


def test_a_fork_that_is_refused_leaves_nothing(writer):
    writer.checkpoint(2)
    given = {"reseed": False, "who": "me"}
    root = writer.session.folder.parent
    for name, step, overrides, error in (
        ("child", 3, [], NoSuchSessionError),
        ("child", 2, ["ppo.epocs=1"], ConfigError),
        ("child", 2, ["data.prompts=/nowhere.jsonl"], ConfigError),
        ("../child", 2, [], SessionNameError),
        ("run", 2, [], SessionNameError),
        ("child", 2, ["train.steps=2"], UserInputError),
    ):
        with pytest.raises(error):
            fork(writer.session, name, from_step=step, overrides=overrides, **given)
    assert [f.name for f in root.iterdir()] == ["run"]


def test_a_fork_that_cannot_copy_the_past_leaves_nothing_and_says_why(make_session, write_in):
    writer = write_in(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(*range(1, 50))
    writer.checkpoint(2)
    writer.journal.close()
    with writer.session.samples_file.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 20_000)  # its first page tells nothing of it
    with pytest.raises(SessionError, match="cannot copy run to child"):
        fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert [f.name for f in writer.session.folder.parent.iterdir()] == ["run"]


def test_a_checkpoint_that_a_live_run_removes_while_it_is_copied_is_told(writer, monkeypatch):
    writer.checkpoint(2)
    folder = checkpoint_path(writer.session.checkpoints, 2)
    link = os.link

    def link_late(source, target):
        shutil.rmtree(folder, ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(NoSuchSessionError, match=r"no checkpoint of step 2 \(it has: none yet\)"):
        fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert [f.name for f in writer.session.folder.parent.iterdir()] == ["run"]


def test_a_checkpoint_whose_deletion_begins_while_it_is_copied_is_told(writer, monkeypatch):
    """Whatever is copied then, files may be missing."""
    writer.checkpoint(2)
    link = os.link

    def link_first(source, target):
        link(source, target)
        if Path(source).name == "COMPLETE":
            Path(source).unlink()

    monkeypatch.setattr(os, "link", link_first)
    with pytest.raises(NoSuchSessionError, match=r"no checkpoint of step 2 \(it has: none yet\)"):
        fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert [f.name for f in writer.session.folder.parent.iterdir()] == ["run"]


def test_a_fork_without_room_for_the_files_of_tensorboard_names_the_first_one(writer):
    session = writer.session
    writer.checkpoint(2)
    session.tensorboard.mkdir()
    for name in ("events-1", "events-2"):
        (session.tensorboard / name).write_bytes(bytes(1_000_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(SessionError) as caught:
            fork(session, "child", from_step=2, reseed=False, overrides=[], who="me")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith("cannot copy run to child: [Errno 27] File too large: ")
    assert str(caught.value).count("tb/events-") == 2  # from one path to the other
    assert [folder.name for folder in session.folder.parent.iterdir()] == ["run"]


def test_a_fork_of_an_archive_that_nobody_can_write_in(make_session, write_in, monkeypatch):
    writer = write_in(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(1, 2)
    writer.checkpoint(2)
    writer.journal.close()
    # Root may write anywhere: what a read-only folder does to SQLite is made by hand.
    connect = sqlite3.connect

    def without_writing(database, **options):
        if "mode=ro" in str(database) and "immutable" not in str(database):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", without_writing)
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    with JournalReader(child) as reader:
        assert reader.last_step() == 2


def test_a_fork_shares_its_checkpoint_and_changes_nothing_in_the_source(writer):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    child, start = fork(
        writer.session, "child", from_step=2, reseed=False, overrides=["kl.beta=0.7"], who="me"
    )
    assert checkpoint_steps(child) == [2]
    assert start.origin == {"from": "run", "step": 2}
    assert child.config().kl.beta == 0.7
    assert writer.session.config().kl.beta != 0.7


def test_a_fork_has_its_checkpoint_once_if_several_attempts_saved_that_step(writer):
    for _ in range(2):
        writer.steps(1, 2)
        writer.checkpoint(2)
        writer.journal.begin_attempt(0, fresh=True)
    writer.steps(1, 2)
    writer.checkpoint(2)
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    with JournalReader(child) as reader:
        assert [(c.step, c.attempt) for c in reader.checkpoints()] == [(2, 3)]


def test_a_fork_has_the_notes_up_to_its_step_and_no_others(writer):
    for step in (1, 2, 3):
        writer.steps(step)
        if step == 2:
            writer.checkpoint(2)
        writer.order(f"note-{step}", "note", text=f"after step {step}")
        writer.journal.commands.apply(f"note-{step}", step + 1, [])
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    with JournalReader(child) as reader:
        notes = [event.payload.text for event in reader.events() if event.kind == "note"]
        assert notes == ["after step 1", "after step 2"]
        assert [command.id for command in reader.commands()] == ["note-1", "note-2"]
    assert not [found for found in verify(child).findings if found.level == "problem"]


def test_a_fork_can_begin_with_an_averaged_policy_and_remembers_that_it_did(writer):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    given = {"from_step": 2, "reseed": False, "overrides": [], "who": "me", "ema": True}
    with pytest.raises(UserInputError, match="no averaged policy; train with"):
        fork(writer.session, "child", **given)
    (writer.session.checkpoints / "step-000002" / "policy-ema").mkdir()
    child, start = fork(writer.session, "child", **given)
    with contextlib.closing(JournalWriter(child)) as journal:
        assert not journal.forked_from_average(2)
        journal.begin_attempt(2, fresh=True, origin=start.origin)
        journal.begin_attempt(2, fresh=False)  # after a crash before its first checkpoint
        assert journal.forked_from_average(2)
        assert not journal.forked_from_average(3)


def test_a_secret_that_cannot_be_used_is_an_error_before_a_fork_is_made(writer, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    machines = ["launch.nodes=2", "launch.rendezvous=localhost:29400"]
    writer.checkpoint(2)
    given = {"reseed": False, "overrides": machines, "who": "me"}
    for start in (
        lambda: resume(writer.session, from_step=None, **given),
        lambda: fork(writer.session, "child", from_step=2, **given),
    ):
        with pytest.raises(UserInputError, match="fewer than 16 characters"):
            start()
    assert not writer.session.folder.with_name("child").exists()
