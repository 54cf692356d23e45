"""Checkpoints that an operator saved stay until somebody deletes them."""

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
from contextlib import closing

import pytest

from engine.errors import CommandRejectedError, SessionLockedError
from engine.journal.fork import copy_until
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch.delete_checkpoint import delete_checkpoint
from engine.launch.start_checkpoints import checkpoint_steps, timeline_checkpoints
from engine.launch.start_options import StartOptions
from engine.protocol.commands import COMMANDS, DeleteCheckpoint, Rollback, Stop
from engine.protocol.rank_messages import CheckpointKept
from engine.session import checkpoints
from engine.session import folder as session_folder
from engine.session.checkpoints import checkpoint_path, incomplete_checkpoints
from engine.supervisor import supervisor
from engine.supervisor.commands import checkpoint_commands
from engine.verification.verify import verify
from tests.engine.supervised import begin_of, until


def kept(session):
    with JournalReader(session) as reader:
        return [c.step for c in reader.checkpoints(("complete",)) if c.kept]


@pytest.fixture
def saved(writer):
    """A session with three checkpoints, the second of which an operator saved."""
    for step in (1, 2, 3):
        writer.steps(step)
        writer.checkpoint(step)
    writer.journal.checkpoints.keep(2)
    return writer


def test_a_kept_checkpoint_is_kept_in_the_next_attempt(saved):
    assert kept(saved.session) == saved.journal.checkpoints.kept() == [2]
    saved.journal.begin_attempt(2, fresh=True)
    assert saved.journal.checkpoints.kept() == [2]
    saved.journal.begin_attempt(1, fresh=True)
    assert saved.journal.checkpoints.kept() == []  # of an abandoned branch, which stays anyway


def test_the_ranks_are_told_what_an_operator_saved_on_an_abandoned_branch(saved):
    assert saved.journal.checkpoints.kept_on_branches() == {}
    first = saved.journal.attempt
    saved.journal.begin_attempt(1, fresh=True)
    assert saved.journal.checkpoints.kept_on_branches() == {2: first}
    saved.checkpoint(2)
    assert saved.journal.checkpoints.kept_on_branches() == {}


def test_a_fork_does_not_keep_what_an_operator_saved_in_its_source(saved):
    config = saved.session.config()
    child = session_folder.create(saved.session.folder.parent, "child", config)
    copy_until(saved.session, child, 2)
    assert kept(child) == []


def test_checkpoints_of_an_earlier_journal_are_read(saved):
    with closing(sqlite3.connect(saved.session.journal_file)) as db, db:
        db.execute("ALTER TABLE checkpoints DROP COLUMN kept")
        db.execute("PRAGMA user_version = 2")
    assert kept(saved.session) == []
    with closing(JournalWriter(saved.session)) as journal:
        journal.checkpoints.keep(3)
    assert kept(saved.session) == [3]


async def test_an_engine_keeps_what_a_rank_says_and_tells_the_next_ranks(engine, saved):
    engine.receive(CheckpointKept(step=3))
    assert saved.journal.checkpoints.kept() == [2, 3]


async def test_an_engine_deletes_a_checkpoint(engine, saved):
    folder = checkpoint_path(saved.session.checkpoints, 2)
    assert engine.send(DeleteCheckpoint(step=2)).status == "applied"
    assert timeline_checkpoints(saved.session) == [1, 3]
    await until(lambda: not folder.exists())
    assert engine.send(DeleteCheckpoint(step=2)).status == "rejected"
    assert engine.send(Rollback(step=2)).status == "rejected"


async def test_the_end_of_a_run_waits_for_the_files_of_a_deleted_checkpoint(
    engine, saved, monkeypatch
):
    ends = threading.Event()

    def remove(folder):
        assert ends.wait(60)
        checkpoints.remove(folder)

    monkeypatch.setattr(checkpoint_commands, "remove", remove)
    engine.send(DeleteCheckpoint(step=2))
    asyncio.get_running_loop().call_soon(ends.set)
    await engine.supervisor.commands.checkpoints.finish()
    assert not checkpoint_path(saved.session.checkpoints, 2).exists()


def test_one_of_a_session_without_an_engine_is_deleted_and_recorded(saved):
    saved.journal.set_meta(state="stopped")
    delete_checkpoint(saved.session, 2, "ana")
    assert timeline_checkpoints(saved.session) == [1, 3]
    assert not checkpoint_path(saved.session.checkpoints, 2).exists()
    with JournalReader(saved.session) as reader:
        (command,) = reader.commands()
    assert COMMANDS[command.command] is DeleteCheckpoint
    assert (command.who, command.args, command.status) == ("ana", {"step": 2}, "applied")
    assert not [f for f in verify(saved.session).findings if f.check in ("checkpoints", "commands")]


def test_the_last_one_is_not_deleted(saved):
    with pytest.raises(CommandRejectedError, match="a resume continues from"):
        delete_checkpoint(saved.session, 3, "ana")
    checkpoint_path(saved.session.checkpoints, 3).rename(saved.session.folder / "away")
    delete_checkpoint(saved.session, 1, "ana")
    assert timeline_checkpoints(saved.session) == [2]


async def test_the_one_of_a_roll_back_whose_attempt_has_not_begun_is_not_deleted(engine, saved):
    rollback = engine.send(Rollback(step=2))
    await until(lambda: engine.shared.next is not None)
    assert saved.journal.commands.reply(rollback.id).status == "applied"
    reply = engine.send(DeleteCheckpoint(step=2))
    assert (reply.status, "a resume continues from" in reply.reason) == ("rejected", True)
    with pytest.raises(CommandRejectedError, match="a resume continues from"):
        delete_checkpoint(saved.session, 2, "ana")
    saved.journal.begin_attempt(1, fresh=True)
    engine.shared.next = None
    assert engine.send(DeleteCheckpoint(step=2)).status == "applied"


def test_a_live_engine_deletes_its_checkpoints_itself(saved):
    lock = saved.session.acquire()
    with pytest.raises(SessionLockedError, match="ctl run delete-checkpoint 2"):
        delete_checkpoint(saved.session, 2, "ana")
    lock.release()


async def test_the_next_attempt_finishes_removals_that_a_kill_interrupted(engine, saved):
    """And touches no checkpoint of which the journal has an attempt that did not remove it."""
    saved.checkpoint(4)
    saved.journal.checkpoints.complete(4, [1, 2])  # the kill follows
    saved.journal.begin_attempt(1, fresh=True)
    saved.journal.checkpoints.record(2, 1000, 0.5, 1.5)  # another one of this step
    shutil.copytree(
        checkpoint_path(saved.session.checkpoints, 3), checkpoint_path(saved.session.checkpoints, 9)
    )
    notes = [f.text for f in verify(saved.session).findings if f.check == "checkpoints"]
    assert "checkpoints were to be removed and are still there, of steps 1" in notes
    engine.shared.next = StartOptions(from_step=2)
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    assert checkpoint_steps(saved.session) == [2, 3, 4, 9]
    assert incomplete_checkpoints(saved.session.checkpoints) == [
        checkpoint_path(saved.session.checkpoints, 1)  # which the ranks delete when they load
    ]


async def test_a_removed_checkpoint_that_was_put_back_from_a_copy_stays(engine, saved):
    folder = checkpoint_path(saved.session.checkpoints, 1)
    saved.journal.checkpoints.complete(3, [1])
    with closing(sqlite3.connect(saved.session.journal_file)) as db, db:  # it was long ago
        db.execute("UPDATE checkpoints SET time = time - 86400 WHERE step = 1")
    shutil.copytree(folder, copy := saved.session.folder / "copy")
    shutil.rmtree(folder)
    copy.rename(folder)
    engine.shared.next = StartOptions(from_step=3)
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    assert checkpoint_steps(saved.session) == [1, 2, 3]


async def test_a_checkpoint_that_a_restored_journal_lacks_is_kept_and_told(engine, saved, tmp_path):
    with closing(sqlite3.connect(saved.session.journal_file)) as db, db:
        db.execute("DELETE FROM checkpoints WHERE step > 1")
        db.execute("DELETE FROM steps WHERE step > 1")
    engine.shared.next = StartOptions(from_step=1)
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    with JournalReader(saved.session) as reader:
        (text,) = (e.payload.text for e in reader.events() if e.kind == "alert")
    assert text.startswith("the journal lacks the checkpoints of steps 2, 3, ")
    assert "continuing from step 1" in text
    assert (await begin_of(engine, tmp_path)).kept_aside == {2: 0, 3: 0}


async def test_a_removal_that_cannot_be_finished_does_not_keep_a_run_from_starting(
    engine, saved, monkeypatch, caplog
):
    def mark_incomplete(_folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(supervisor, "mark_incomplete", mark_incomplete)
    saved.journal.checkpoints.complete(3, [1])
    engine.shared.next = StartOptions(from_step=3)
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    assert "the removed checkpoint of step 1 is still there" in caplog.text


def test_a_deletion_is_recorded_with_its_command_or_not_at_all(saved):
    saved.order("a", DeleteCheckpoint.name(), step=2)
    with closing(sqlite3.connect(saved.session.journal_file)) as db:
        db.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON commands BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
        with pytest.raises(sqlite3.Error, match="full"):
            saved.journal.delete_checkpoint(2, "a")
        db.execute("DROP TRIGGER full")
    assert saved.journal.checkpoints.steps() == [1, 2, 3]
    saved.journal.delete_checkpoint(2, "a")
    assert saved.journal.checkpoints.steps() == [1, 3]
    assert saved.journal.commands.reply("a").status == "applied"
