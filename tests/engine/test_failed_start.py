"""A start that failed does not block its name; a session in which anything was trained does."""

import asyncio
import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from engine.errors import (
    ConfigError,
    NoSuchSessionError,
    SessionError,
    SessionNameError,
    UserInputError,
)
from engine.journal.judgements.labels import Response, set_label
from engine.journal.reader import JournalReader
from engine.launch.background import start_engine, start_or_remove
from engine.launch.failed_start import (
    INTERRUPTED_EXIT,
    NewSession,
    is_failed_start,
    remove_failed_start,
)
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.start import fork, resume
from engine.launch.start_checkpoints import checkpoint_steps
from engine.launch.start_options import StartOptions
from engine.protocol import sockets
from engine.session import folder as session_folder
from engine.session.checkpoints import remove
from engine.session.folder import SessionFolder
from engine.supervisor.processes import rank_processes
from engine.supervisor.serve import supervise
from tests.engine import supervised
from tests.waiting import LONG, until


@pytest.fixture
def failed(make_session, write_in):
    """A session whose only start failed; `then` may write more first."""

    def make(then=lambda writer: None, state="failed", name="failed"):
        writer = write_in(make_session(name))
        writer.journal.begin_attempt(0, fresh=False)
        then(writer)
        writer.journal.set_meta(state=state)
        writer.journal.close()
        return writer.session

    return make


async def test_the_log_says_why_a_run_failed(make_session, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: ["sh", "-c", "exit 3"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert await supervise(make_session("run", "launch.max_restarts=0"), StartOptions()) == 1
    found = [r for r in caplog.records if "rank 0 ended with status 3" in r.getMessage()]
    assert [r.levelname for r in found] == ["ERROR"]


@pytest.mark.parametrize("state", ["failed", "stopped", "starting"])
def test_a_session_that_ended_before_its_first_step_gives_up_its_name(failed, make_session, state):
    session = failed(state=state)  # `starting` without an engine: it was killed
    with pytest.raises(SessionNameError):
        make_session("failed")
    remove_failed_start(session)
    assert make_session("failed").config_file.is_file()


def test_a_session_that_another_start_has_put_in_its_place_is_kept(
    failed, make_session, monkeypatch
):
    session, acquire = failed(), SessionFolder.acquire

    def acquire_late(self):
        monkeypatch.undo()
        shutil.rmtree(self.folder)
        make_session("failed")
        return acquire(self)

    monkeypatch.setattr(SessionFolder, "acquire", acquire_late)
    remove_failed_start(session)
    assert session.config_file.is_file()


def stepped_and_restarted(writer):
    writer.steps(1, 2)
    writer.journal.begin_attempt(0, fresh=False)  # no checkpoint yet: from the start


def labelled(writer):
    response = Response(response="fine", attempt=1, step=0, index=0)
    set_label(writer.session, "the film", response, "good", "ann")


@pytest.mark.parametrize(
    "then",
    [
        lambda writer: writer.steps(1),
        stepped_and_restarted,
        lambda writer: (writer.session.checkpoints / "step-000001").mkdir(),
        lambda writer: writer.journal.record_event("note", {"text": "look", "who": "ann"}),
        lambda writer: writer.change("c", 1, 0.1, 0.2),
        labelled,
    ],
    ids=[
        "a step", "a step of an abandoned branch", "a checkpoint without a journal",
        "a note", "a setting", "a judgement of the evaluation before the first step",
    ],
)  # fmt: skip
def test_a_session_with_anything_that_would_be_lost_is_kept(failed, then):
    session = failed(then)
    assert not is_failed_start(session)
    remove_failed_start(session)
    assert session.config_file.is_file()


def test_a_session_that_runs_or_was_just_created_is_kept(failed, make_session):
    session = failed()
    held = session.acquire()
    assert not is_failed_start(session)
    held.release()
    assert not is_failed_start(make_session("new"))  # its engine may be about to start


def test_a_fork_that_failed_can_be_made_again_and_its_source_is_whole(writer, write_in):
    writer.steps(1, 2)
    writer.checkpoint(2)
    given = {"from_step": 2, "reseed": False, "overrides": [], "who": "me"}
    child, start = fork(writer.session, "child", **given)
    of_child = write_in(child)
    of_child.journal.begin_attempt(2, fresh=True, origin=start.origin)
    of_child.journal.set_meta(state="failed")
    assert is_failed_start(child)

    again, _ = fork(writer.session, "child", **given)
    assert not is_failed_start(again)
    assert (writer.session.checkpoints / "step-000002" / "COMPLETE").exists()

    of_again = write_in(again)
    of_again.journal.begin_attempt(2, fresh=True, origin=start.origin)
    of_again.steps(3)
    of_again.journal.set_meta(state="failed")
    with pytest.raises(SessionNameError):
        fork(writer.session, "child", **given)


@pytest.mark.parametrize("source", ["deleted", "without the checkpoint", "another one"])
def test_a_failed_fork_that_alone_has_its_checkpoint_is_kept(writer, write_in, source):
    writer.steps(1, 2)
    writer.checkpoint(2)
    child, start = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    of_child = write_in(child)
    of_child.journal.begin_attempt(2, fresh=True, origin=start.origin)
    of_child.journal.set_meta(state="failed")
    assert is_failed_start(child)
    folder = writer.session.checkpoints / "step-000002"
    if source == "deleted":
        shutil.rmtree(writer.session.folder)
    elif source == "another one":  # a session that took the name of the first
        (folder / "COMPLETE").unlink()
        (folder / "COMPLETE").write_text("another sum\n")
    else:
        remove(folder)
    assert not is_failed_start(child)
    remove_failed_start(child)
    assert checkpoint_steps(child) == [2]


def test_an_engine_that_cannot_write_its_log_is_not_explained_by_an_old_line(failed):
    session = failed()
    session.log_file.write_text("what went wrong last time\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as on a full disk: no file can grow
    try:
        with pytest.raises(SessionError) as caught:
            start_engine(session, StartOptions(), timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "last time" not in str(caught.value)
    assert "exit code" in str(caught.value)


async def test_a_start_that_fails_before_its_ranks_leaves_nothing_behind(
    make_session, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    session = make_session("run", "launch.nodes=2", "launch.rendezvous=127.0.0.1:29400")
    before = session.config()
    with pytest.raises(UserInputError, match=SECRET_VARIABLE):
        given = ["train.steps=7", "train.best_metric=objective/kl"]
        await supervise(session, StartOptions(overrides=given))
    assert not (session.folder / sockets.NAME).exists()
    assert not list((tmp_path / "state").rglob("live/*"))
    assert session.config() == before
    with JournalReader(session) as reader:
        found = reader.meta()
    assert (found.total_steps, found.best_metric) == (before.train.steps, before.train.best_metric)
    session.acquire().release()


async def test_a_file_that_cannot_be_removed_does_not_hide_why_an_engine_has_ended(make_session):
    session = make_session("run")
    session.config_file.write_text("")
    session.engine_file.mkdir()
    with pytest.raises(ConfigError, match=r"restore it from a copy"):
        await supervise(session, StartOptions())
    session.acquire().release()


async def test_a_start_that_waits_for_another_machine_can_be_interrupted(
    make_session, monkeypatch, caplog
):
    monkeypatch.setattr(session_folder, "SIGN_INTERVAL", 1.0)
    session = make_session()
    info = {"pid": 1, "host": "far-away", "socket": "/x", "version": "1"}
    session.engine_file.write_text(json.dumps(info))
    start = asyncio.create_task(supervise(session, StartOptions()))
    await supervised.until(lambda: "waiting 3 s" in caplog.text)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not session.journal_file.exists()
    session.acquire().release()


@pytest.mark.parametrize("left", ["samples.db", "labels.db"])
def test_what_is_left_of_a_session_that_lost_its_journal_is_not_removed_with_a_failed_resume(
    make_session, left
):
    session = make_session("run", "model.policy=/no/such/model")
    sample = Response(response="answer", attempt=1, step=1, index=0)
    if left == "labels.db":
        set_label(session, "prompt", sample, "good", "me")
    else:
        (session.folder / left).touch()
    start = resume(session, from_step=None, reseed=False, overrides=[], who="me")
    with pytest.raises(UserInputError, match="/no/such/model"):
        start_or_remove(session, start, timeout=LONG)
    assert (session.folder / left).exists()


def test_a_fork_in_which_something_was_judged_is_not_removed_with_its_failed_start(make_session):
    session = make_session()
    new = NewSession(session, StartOptions(origin={"from": "parent", "step": 4}))
    sample = Response(response="answer", attempt=1, step=1, index=0)
    set_label(session, "prompt", sample, "good", "me")
    assert not new.remove_if_unused(UserInputError.exit_code)
    assert session.labels_file.exists()


@pytest.mark.parametrize(
    ("code", "attempted", "removed"),
    [
        (UserInputError.exit_code, True, True), (INTERRUPTED_EXIT, False, True),
        (INTERRUPTED_EXIT, True, False), (SessionError.exit_code, False, False),
        (0, True, False), (None, False, False),
    ],
    ids=[
        "wrong input", "interrupted before its first attempt", "interrupted later",
        "a failure, whose log stays", "the end of the run", "a start that has not ended",
    ],
)  # fmt: skip
def test_a_new_session_is_removed_if_nothing_came_of_its_start(
    make_session, write_in, code, attempted, removed
):
    session = make_session()
    new = NewSession(session, StartOptions())
    if attempted:
        writer = write_in(session)
        writer.journal.begin_attempt(0, fresh=False)
        writer.journal.close()
    assert new.remove_if_unused(code) == removed
    assert session.folder.exists() != removed


def test_a_new_session_that_another_engine_has_is_not_removed(make_session):
    session = make_session()
    new, held = NewSession(session, StartOptions()), session.acquire()
    assert not new.remove_if_unused(UserInputError.exit_code)
    held.release()
    assert session.config_file.is_file()


def test_a_new_session_that_was_deleted_meanwhile_need_not_be_removed(make_session):
    session = make_session()
    new = NewSession(session, StartOptions())
    shutil.rmtree(session.folder)
    assert not new.remove_if_unused(UserInputError.exit_code)
    assert not session.folder.exists()


def test_a_start_beside_a_deletion_of_the_session_says_so(make_session):
    session = make_session()
    shutil.rmtree(session.folder)
    with pytest.raises(NoSuchSessionError, match="was deleted while it was started"):
        start_engine(session, StartOptions(), timeout=0)


def test_of_two_engines_that_start_at_once_the_refused_one_is_not_taken_for_the_other(
    make_session, write_in
):
    session = make_session()
    held, writer = session.acquire(), write_in(session)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(start_engine, session, StartOptions(), timeout=LONG)
        until(lambda: psutil.Process().children())
        session.write_engine("/a/socket", "1")
        writer.journal.begin_attempt(0, fresh=False)
        writer.journal.set_meta(state="running")
        with pytest.raises(SessionError, match="already has an engine"):
            refused.result()
    held.release()
    writer.journal.close()


def test_a_new_session_is_locked_while_it_is_removed(make_session, monkeypatch):
    """Otherwise an engine that starts just then would lose its files."""
    session, locked, delete = make_session(), [], SessionFolder.delete
    new = NewSession(session, StartOptions())

    def record(folder, held):
        locked.append(folder.is_live())
        delete(folder, held)

    monkeypatch.setattr(SessionFolder, "delete", record)
    assert new.remove_if_unused(UserInputError.exit_code)
    assert locked == [True]
    assert not session.folder.exists()
