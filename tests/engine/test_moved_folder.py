"""Folders that are moved, deleted or replaced while an engine runs."""

import asyncio
import contextlib
import json
import shutil
import signal

import psutil
import pytest

from benchmarks.terminal import Engine as StandInEngine
from engine.errors import NoSuchSessionError
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch.start_options import StartOptions
from engine.protocol.client import Client
from engine.protocol.rank_messages import CheckpointWritten, Ended
from engine.session import registry
from engine.session.file_signature import file_id
from engine.session.folder import SessionFolder
from engine.supervisor import watchdog as watchdog_module
from engine.supervisor.processes import rank_processes
from engine.supervisor.serve import supervise
from tests.engine.supervised import begin_of, until

RANK = ["sleep", "307"]


def rank_runs():
    """Whether the rank has been started; other tests may have left other processes."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            if RANK[1] in child.cmdline():
                return True
    return False


def move(session):
    """Moves the folder of a session; returns the session at its new place."""
    return SessionFolder(session.folder.rename(session.folder.with_name("moved")))


def statuses(session):
    """The steps of all checkpoints, with what became of them."""
    with JournalReader(session) as reader:
        kinds = ("complete", "written", "superseded", "abandoned")
        return {c.step: c.status for c in reader.checkpoints(kinds)}


@pytest.mark.parametrize("replaced", [False, True])
async def test_ranks_do_not_start_again_without_the_folder_of_their_checkpoints(
    engine, writer, make_session, replaced
):
    """A restart would begin at step 0 and abandon the run's steps."""
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    moved = move(writer.session)
    if replaced:
        make_session("run")
    assert engine.supervisor.attempt_end.handle(-signal.SIGKILL) == 1
    assert (engine.shared.next, engine.state) == (None, "failed")
    assert statuses(moved) == {2: "complete"}
    with JournalReader(moved) as reader:
        assert reader.last_step() == 3
        assert reader.meta().message.startswith(f"the folder {writer.session.folder} was moved")


async def test_a_run_whose_folder_was_moved_at_its_end_is_not_finished(engine, writer):
    """Its last checkpoint is missing, and a resume makes it."""
    moved = move(writer.session)
    engine.receive(Ended(step=4, reason="finished"))
    assert engine.supervisor.attempt_end.handle(0) == 1
    with JournalReader(moved) as reader:
        assert reader.meta().state == "failed"


async def test_a_checkpoint_in_a_folder_that_has_replaced_the_sessions_does_not_count(
    engine, writer, make_session
):
    written = CheckpointWritten(step=2, size=1, score=0.0, kl=0.0)
    moved = move(writer.session)
    make_session("run")
    engine.receive(written)
    assert statuses(moved) == {}
    shutil.rmtree(writer.session.folder)
    moved.folder.rename(writer.session.folder)
    engine.receive(written)
    assert statuses(writer.session) == {2: "written"}


async def test_the_ranks_are_told_which_journal_is_that_of_the_session(engine, writer, tmp_path):
    """By it they see that another session is at its path, and save nothing there."""
    begin = await begin_of(engine, tmp_path)
    assert begin.journal == file_id(writer.session.journal_file)


@pytest.fixture
async def started(make_session, tmp_path, monkeypatch):
    """A session whose engine has started a rank that trains nothing, and the engine's task."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: RANK)
    monkeypatch.setattr(watchdog_module, "CHECK_INTERVAL", 0.01)
    session = make_session()
    task = asyncio.create_task(supervise(session, StartOptions()))
    await until(rank_runs)
    yield session, task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_ends_when_its_folder_is_moved(started):
    session, task = started
    moved = move(session)
    assert await asyncio.wait_for(task, 60) == 1
    assert not session.folder.exists()
    assert not moved.is_live()
    assert not moved.engine_file.exists()
    with JournalReader(moved) as reader:
        assert reader.state() == "failed"


async def test_an_engine_outlives_a_folder_that_is_away_for_a_moment(started, monkeypatch):
    """As that of a network file system which is mounted again."""
    session, task = started
    seen = []
    in_place = JournalWriter.is_in_place

    def counted(journal):
        seen.append(in_place(journal))
        if seen.count(False) == 1 and not seen[-1]:
            moved.folder.rename(session.folder)
        return seen[-1]

    monkeypatch.setattr(JournalWriter, "is_in_place", counted)
    moved = move(session)
    await until(lambda: seen[-3:] == [True] * 3)
    assert False in seen
    assert not task.done()
    assert rank_runs()


async def test_absences_of_a_folder_that_have_ended_do_not_add_up(started, monkeypatch):
    _session, task = started
    checks = [*[False] * (watchdog_module.CHECKS_OF_FOLDER - 1), True] * 3
    monkeypatch.setattr(JournalWriter, "is_in_place", lambda _journal: not checks or checks.pop(0))
    await until(lambda: not checks or task.done())
    assert not task.done()
    assert rank_runs()


async def test_an_engine_ends_when_its_folder_is_deleted(started):
    session, task = started
    shutil.rmtree(session.folder)
    await asyncio.wait([task], timeout=60)
    assert task.done()
    assert not session.folder.exists()


async def test_an_engine_leaves_the_files_of_the_session_in_its_place(started, make_session):
    session, task = started
    move(session)
    other = make_session("run")
    held = other.acquire()
    other.write_engine("/a/socket", "1.0")
    registry.announce(other)
    assert await asyncio.wait_for(task, 60) == 1
    assert other.engine().socket == "/a/socket"
    assert registry.live_sessions() == [other]
    held.release()


async def test_ranks_restart_in_the_sessions_folder_if_that_of_the_command_is_deleted(
    make_session, tmp_path, monkeypatch
):
    """In a deleted one, MKL cannot load its libraries."""
    folder, found = tmp_path / "started-here", tmp_path / "found"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command = ["sh", "-c", f"pwd -P >> {found}; rm -rf {folder}; exit 1"]
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: command)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    session = make_session("run", "launch.max_restarts=1")
    assert await supervise(session, StartOptions()) == 1
    expected = [str(path.resolve()) for path in (folder, session.folder)]
    assert found.read_text().splitlines() == expected


@pytest.fixture
def stand_in():
    """Starts engines that only reply, in this process."""
    engines = []

    def start(session):
        engines.append(StandInEngine(session))
        return session

    yield start
    for engine in engines:
        engine.server.close()
        engine.lock.release()


def test_a_command_for_a_moved_session_does_not_reach_the_one_at_its_old_path(
    make_session, stand_in
):
    moved = move(stand_in(make_session("run")))
    other = stand_in(make_session("run"))
    Client(other, "me").close()
    with pytest.raises(NoSuchSessionError, match="session 'moved' was moved or copied"):
        Client(moved, "me")


def test_a_command_for_a_copy_that_starts_does_not_reach_the_original(make_session, stand_in):
    session = stand_in(make_session("run"))
    copy = SessionFolder(session.folder.with_name("copy"))
    ignore = shutil.ignore_patterns("engine.sock")
    shutil.copytree(session.folder, copy.folder, ignore=ignore)
    lock = copy.acquire()  # the engine of the copy has not replaced engine.json yet
    with pytest.raises(NoSuchSessionError, match="try again"):
        Client(copy, "me")
    lock.release()


def test_a_command_does_not_reach_an_engine_other_than_the_recorded_one(make_session, stand_in):
    """Its socket may be under /tmp, where its name comes from the path of the folder."""
    session = stand_in(make_session("run"))
    info = json.loads(session.engine_file.read_text())
    session.engine_file.write_text(json.dumps(info | {"pid": info["pid"] + 1}))
    with pytest.raises(NoSuchSessionError, match="session 'run' was moved or copied"):
        Client(session, "me")
