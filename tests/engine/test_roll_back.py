"""Roll backs: their checkpoint is read while the run goes on, and may be gone afterwards."""

import asyncio
import errno
import os
import sqlite3
import threading
from contextlib import closing

import pytest

from engine.journal.reader import JournalReader
from engine.launch.start_checkpoints import timeline_checkpoints
from engine.launch.start_options import StartOptions
from engine.protocol import rank_messages
from engine.protocol.commands import Checkpoint, Rollback, Stop
from engine.protocol.rank_messages import Applied, CheckpointComplete, Rejected
from engine.session.checkpoints import checkpoint_path
from engine.supervisor.commands import checkpoint_commands, command_handler
from engine.supervisor.server import receive
from tests.engine.supervised import rank_connection, until


async def settled(writer, command_id):
    """The reply to a roll back, after its checkpoint is read."""
    await until(lambda: writer.journal.commands.reply(command_id).final)
    return writer.journal.commands.reply(command_id)


async def test_a_roll_back_to_a_damaged_checkpoint_is_rejected_and_the_run_continues(
    engine, writer
):
    writer.checkpoint(2)
    (checkpoint_path(writer.session.checkpoints, 2) / "state.json").write_text("{}")
    reply = engine.send(Rollback(step=2))
    assert reply.status == "accepted"
    reply = await settled(writer, reply.id)
    assert reply.status == "rejected"
    assert reply.reason.startswith("the checkpoint of step 2 is damaged: ")
    assert (engine.shared.next, engine.state) == (None, "running")


async def test_a_roll_back_to_a_checkpoint_that_a_restart_leaves_behind_is_rejected(engine, writer):
    writer.checkpoint(2)
    reply = engine.send(Rollback(step=2))
    writer.journal.begin_attempt(0, fresh=False)
    reply = await settled(writer, reply.id)
    assert reply.status == "rejected"
    assert reply.reason == "step 2 is no longer a checkpoint of this run"
    assert engine.shared.next is None


async def test_a_roll_back_whose_journal_cannot_be_read_any_more_is_rejected(engine, writer):
    writer.checkpoint(2)
    reply = engine.send(Rollback(step=2))
    with closing(sqlite3.connect(writer.session.journal_file)) as db:
        db.execute("PRAGMA user_version = 99")
    reply = await settled(writer, reply.id)
    assert (reply.status, engine.shared.next) == ("rejected", None)
    assert "journal.db" in reply.reason


async def test_a_roll_back_for_which_no_thread_can_be_started_is_rejected_and_bars_no_other(
    engine, writer, monkeypatch
):
    writer.checkpoint(2)

    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", start)
        reply = await settled(writer, engine.send(Rollback(step=2)).id)
    assert (reply.status, engine.shared.next) == ("rejected", None)
    assert "can't start new thread" in reply.reason
    assert (await settled(writer, engine.send(Rollback(step=2)).id)).status == "applied"


async def test_a_roll_back_is_rejected_while_the_checkpoints_cannot_be_listed(
    engine, writer, monkeypatch
):
    """As on a network file system that is gone for a while: when it is asked, or has been read."""
    writer.checkpoint(2)

    def unreadable(_session):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as context:
        context.setattr(command_handler, "timeline_checkpoints", unreadable)
        reply = engine.send(Rollback(step=2))
        assert (reply.status, "Stale file handle" in reply.reason) == ("rejected", True)
    reply = engine.send(Rollback(step=2))
    monkeypatch.setattr(checkpoint_commands, "timeline_checkpoints", unreadable)
    reply = await settled(writer, reply.id)
    assert (reply.status, "Stale file handle" in reply.reason) == ("rejected", True)
    assert engine.shared.next is None


async def test_only_one_checkpoint_is_read_for_a_roll_back_at_a_time(engine, writer):
    writer.checkpoint(2)
    first, second = engine.send(Rollback(step=2)), engine.send(Rollback(step=2))
    assert (first.status, second.status) == ("accepted", "rejected")
    assert "another roll back" in second.reason
    assert (await settled(writer, first.id)).status == "applied"


async def test_a_roll_back_that_the_end_of_the_run_overtakes_is_rejected(engine, writer):
    writer.checkpoint(2)
    reply = engine.send(Rollback(step=2))
    await engine.supervisor.commands.checkpoints.finish()
    reply = writer.journal.commands.reply(reply.id)
    assert (reply.status, engine.shared.next) == ("rejected", None)
    assert reply.reason == "the run ended before it was carried out"


async def test_a_roll_back_is_rejected_if_a_stop_comes_while_its_checkpoint_is_read(engine, writer):
    writer.checkpoint(2)
    reply = engine.send(Rollback(step=2))
    assert engine.send(Stop()).status == "accepted"
    reply = await settled(writer, reply.id)
    assert (reply.status, engine.shared.next) == ("rejected", None)
    assert "stopping" in reply.reason


async def test_a_stop_at_once_and_a_roll_back_under_way_both_take_effect(engine, writer):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    reply = engine.send(Rollback(step=2))
    await settled(writer, reply.id)
    assert engine.shared.next == StartOptions(from_step=2, fresh=True, who="me")
    assert engine.send(Stop(now=True)).status == "applied"
    assert await engine.supervisor.run() == 0
    assert engine.state == "stopped"
    assert not engine.supervisor.ranks.token  # none were started
    with JournalReader(writer.session) as reader:
        assert reader.attempts()[-1].from_step == reader.last_step() == 2


async def test_a_roll_back_is_rejected_after_a_stop_at_once(engine, writer):
    writer.checkpoint(2)
    engine.send(Stop(now=True))
    reply = engine.send(Rollback(step=2))
    assert (reply.status, engine.shared.next) == ("rejected", None)
    assert "stopping" in reply.reason


@pytest.mark.parametrize("read", [False, True])
async def test_no_save_removes_the_checkpoint_of_a_roll_back_until_its_attempt_has_begun(
    engine, writer, tmp_path, read
):
    writer.steps(1, 2, 3, 4)
    writer.checkpoint(1)
    writer.checkpoint(2)
    server, reader, to_engine = await rank_connection(engine, tmp_path)
    async with server:
        await receive(reader)  # where to begin
        reply = engine.send(Rollback(step=2))
        if read:
            assert (await settled(writer, reply.id)).status == "applied"
        writer.journal.checkpoints.record(4, 1, 0.0, 0.0)
        engine.receive(CheckpointComplete(step=4, removed=[1, 2]))
        confirm = rank_messages.decode_to_rank(await receive(reader))
        to_engine.close()
    assert (confirm.step, confirm.needed) == (4, [2])
    assert 2 in timeline_checkpoints(writer.session)
    with JournalReader(writer.session) as journal:
        assert [c.step for c in journal.checkpoints(("removed",))] == [1]
    assert (await settled(writer, reply.id)).status == "applied"
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    assert writer.journal.checkpoints.steps() == [2]
    assert engine.shared.needed() == set()  # from now on it is as any other
    writer.journal.checkpoints.record(3, 1, 0.0, 0.0)
    engine.receive(CheckpointComplete(step=3, removed=[2]))
    assert writer.journal.checkpoints.steps() == [3]


async def test_the_checkpoint_of_a_rejected_roll_back_can_be_removed(engine, writer):
    writer.checkpoint(2)
    (checkpoint_path(writer.session.checkpoints, 2) / "state.json").write_text("{}")
    assert (await settled(writer, engine.send(Rollback(step=2)).id)).status == "rejected"
    assert engine.shared.needed() == set()


@pytest.mark.parametrize("saved", [True, False])
async def test_a_checkpoint_that_was_asked_for_before_a_roll_back_is_saved_first(
    engine, writer, saved
):
    writer.checkpoint(2)
    save = engine.send(Checkpoint())
    reply = engine.send(Rollback(step=2))
    engine.send(Checkpoint())  # this one is of the steps after the roll back
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await settled(writer, reply.id)
    assert engine.shared.next is None
    engine.receive(Applied(id=save.id, step=5) if saved else Rejected(id=save.id, reason="full"))
    assert (await settled(writer, reply.id)).status == "applied"
    assert engine.shared.next == StartOptions(from_step=2, fresh=True, who="me")


async def test_a_stop_at_once_ends_the_wait_of_a_roll_back_for_a_save(engine, writer):
    writer.checkpoint(2)
    save, reply = engine.send(Checkpoint()), engine.send(Rollback(step=2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await settled(writer, reply.id)
    engine.send(Stop(now=True))
    assert await engine.supervisor.run() == 0
    for command_id in (save.id, reply.id):
        ended = writer.journal.commands.reply(command_id)
        assert (ended.status, ended.reason) == (
            "rejected", "the run ended before it was carried out"
        )  # fmt: skip
    assert engine.shared.next is None
