"""A journal that cannot be written: stops need none, everything else waits or is rejected."""

import asyncio
import resource
import signal
import sqlite3
import sys
from contextlib import ExitStack, closing, contextmanager

import pytest

from engine.config.sections.launch import LaunchConfig
from engine.errors import JournalError, SessionError
from engine.journal import writer as journal_writer
from engine.journal.notes import add_note
from engine.journal.reader import JournalReader
from engine.launch import delete_checkpoint as deletion
from engine.launch.start_options import StartOptions
from engine.metrics import NONFINITE_UPDATES
from engine.protocol import frames
from engine.protocol.commands import DeleteCheckpoint, Pause, SetBeta, Stop, Unpause
from engine.protocol.rank_messages import (
    ROOM,
    Applied,
    CheckpointComplete,
    CheckpointWritten,
    Ended,
    Failed,
    Paused,
    Ready,
    StepReport,
    Unpaused,
)
from engine.session import checkpoints
from engine.session.folder import SessionFolder
from engine.supervisor import journal_wait
from engine.supervisor.attempt import Attempt
from engine.supervisor.commands import checkpoint_commands
from engine.supervisor.processes import rank_processes
from engine.supervisor.processes.rank_processes import RankProcesses
from tests.engine.supervised import apply_pending, rank_connection, until


@contextmanager
def no_room_for_files(limit=resource.RLIMIT_FSIZE):
    """No file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def no_file_can_be_opened():
    """As in a process that has too many open."""
    return no_room_for_files(resource.RLIMIT_NOFILE)


def test_a_note_on_a_full_disk_says_what_to_do(make_session):
    session = make_session()
    with no_room_for_files(), pytest.raises(JournalError, match=r"is full: free some space$"):
        add_note(session, "look", "ana")


async def test_a_command_on_a_full_disk_says_what_to_do(engine):
    with no_room_for_files():
        reply = engine.send(SetBeta(value=0.3))
    assert reply.status == "rejected"
    assert reply.reason.endswith("is full: free some space")


async def test_a_stop_at_once_needs_no_journal(engine):
    with no_room_for_files():
        reply = engine.send(Stop(now=True))
    assert reply.status == "applied"
    assert reply.reason.startswith("cannot write the journal")
    assert engine.shared.stop_now


@pytest.fixture
def full_until_removal(monkeypatch):
    """A disk that is full until a checkpoint is removed; call the fixture to fill it."""
    with ExitStack() as room:

        def remove(folder):
            checkpoints.remove(folder)
            room.close()

        monkeypatch.setattr(checkpoint_commands, "remove", remove)
        monkeypatch.setattr(deletion, "remove", remove)
        yield lambda: room.enter_context(no_room_for_files())


async def test_a_checkpoint_is_deleted_on_a_full_disk_and_then_recorded(
    engine, writer, full_until_removal
):
    for step in (1, 2):
        writer.checkpoint(step)
    full_until_removal()
    reply = engine.send(DeleteCheckpoint(step=1))
    assert (reply.status, reply.reason[:24]) == ("applied", "cannot write the journal")
    await until(lambda: writer.journal.checkpoints.steps() == [2])
    assert writer.journal.commands.reply(reply.id).status == "applied"
    assert list(checkpoints.complete_checkpoints(writer.session.checkpoints)) == [2]


def test_a_checkpoint_of_a_session_without_an_engine_is_deleted_on_a_full_disk(
    make_session, write_in, full_until_removal
):
    writer = write_in(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    for step in (1, 2):
        writer.checkpoint(step)
    writer.journal.close()
    full_until_removal()
    deletion.delete_checkpoint(writer.session, 1, "ana")
    with JournalReader(writer.session) as reader:
        assert [c.step for c in reader.checkpoints()] == [2]
        assert [c.status for c in reader.commands()] == ["applied"]


@contextmanager
def full_after_acceptance(journal, monkeypatch):
    """A disk that is full from when the command is accepted in the journal."""
    accept, room = journal.commands.accept, ExitStack()

    def accept_last(command_id):
        accept(command_id)
        room.enter_context(no_room_for_files())

    with monkeypatch.context() as patched, room:
        patched.setattr(journal.commands, "accept", accept_last)
        yield


async def test_a_stop_at_once_that_is_accepted_and_cannot_be_recorded_is_applied(
    engine, writer, monkeypatch
):
    engine.supervisor.publisher.set_state("starting")
    with full_after_acceptance(writer.journal, monkeypatch):
        reply = engine.send(Stop())
    assert (reply.status, reply.reason[:24]) == ("applied", "cannot write the journal")
    assert engine.shared.stop_now


@pytest.mark.parametrize("command", [Stop(), Pause()])
async def test_a_command_that_is_accepted_before_the_disk_is_full_reaches_the_ranks_once(
    engine, writer, monkeypatch, command
):
    with full_after_acceptance(writer.journal, monkeypatch):
        reply = engine.send(command)
    assert (reply.status, reply.reason[:24]) == ("accepted", "cannot write the journal")
    assert [m.command for m in engine.supervisor.pending.messages()] == [command]
    assert engine.shared.stopping == (command == Stop())
    apply_pending(engine)
    with JournalReader(writer.session) as reader:
        assert [c.status for c in reader.commands()] == ["applied"]


async def test_a_stop_reaches_the_ranks_without_a_journal_and_is_recorded_later(engine, writer):
    with no_room_for_files():
        engine.supervisor.commands.on_signal(signal.SIGTERM)
        assert engine.send(Stop()).reason == "the run is already stopping"
    (command,) = engine.supervisor.pending.messages()
    assert command.command == Stop()
    assert engine.state == "stopping"
    engine.receive(Applied(id=command.id, step=4))
    with JournalReader(writer.session) as reader:
        assert [(c.who, c.status) for c in reader.commands()] == [("SIGTERM", "applied")]


async def test_a_checkpoint_that_concludes_on_a_full_disk_waits_for_room(
    engine, writer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(journal_wait, "RETRY_INTERVAL", 0.01)
    server, _, to_engine = await rank_connection(engine, tmp_path)
    writer.journal.checkpoints.record(4, 1, 0.0, 0.0)
    caplog.set_level("INFO", "engine")
    async with server:
        with no_room_for_files():
            to_engine.write(frames.encode(CheckpointComplete(step=4)))
            await until(lambda: "waiting for room" in caplog.text)
            assert engine.shared.phases[0].waits_for == ROOM
            assert engine.send(SetBeta(value=0.2)).status == "rejected"
        await until(lambda: "can be written again" in caplog.text)
        assert not engine.shared.phases
        to_engine.close()
    with JournalReader(writer.session) as reader:
        assert [c.status for c in reader.checkpoints(("complete",))] == ["complete"]
    assert engine.shared.attempt.failure is None


async def test_a_checkpoint_is_recorded_once_a_file_can_be_opened_again(
    engine, writer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(journal_wait, "RETRY_INTERVAL", 0.01)
    server, _, to_engine = await rank_connection(engine, tmp_path)
    caplog.set_level("INFO", "engine")
    async with server:
        await until(lambda: engine.shared.attempt.is_connected(0))
        with no_file_can_be_opened():
            to_engine.write(frames.encode(CheckpointWritten(step=4, size=1, score=0.0, kl=0.0)))
            await until(lambda: 0 in engine.shared.phases)
            assert engine.shared.phases[0].waits_for == journal_wait.CLOSED_FILES
        await until(lambda: "can be written again" in caplog.text)
        to_engine.close()
    with JournalReader(writer.session) as reader:
        assert [c.step for c in reader.checkpoints(("written",))] == [4]
    assert engine.shared.attempt.failure is None


async def test_the_ranks_are_killed_though_no_file_can_be_opened(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: command)
    ranks = RankProcesses(SessionFolder(tmp_path), tmp_path / "engine.sock", LaunchConfig())
    await ranks.start({})
    with no_file_can_be_opened():
        ranks.kill()
    assert await asyncio.wait_for(ranks.wait(), 60) == -signal.SIGKILL


@pytest.fixture
def locked(engine, writer, monkeypatch):
    """A context in which another program keeps the journal locked, which nobody waits for long."""
    monkeypatch.setattr(journal_wait, "RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(journal_writer, "LOCK_TIMEOUT", 0.0)
    writer.journal.begin_serving()

    @contextmanager
    def lock():
        with closing(sqlite3.connect(writer.session.journal_file)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield

    return lock


async def test_a_step_waits_while_another_program_locks_the_journal(
    engine, writer, tmp_path, locked, caplog
):
    """As a viewer does on a network file system if it is stopped while it reads."""
    server, _, to_engine = await rank_connection(engine, tmp_path)
    report = StepReport(step=1, metrics={"time/step": 1.0}, samples=[], settings={"beta": 0.1})
    async with server:
        with locked():
            to_engine.write(frames.encode(report))
            await until(lambda: 0 in engine.shared.phases)
            assert engine.shared.phases[0].waits_for == journal_wait.UNLOCKED_JOURNAL
            assert engine.send(SetBeta(value=0.2)).status == "rejected"
        await until(lambda: writer.journal.step == 1)
        await until(lambda: not engine.shared.phases)
        to_engine.close()
    assert "cannot write the journal: database is locked; waiting for" in caplog.text
    assert engine.shared.attempt.failure is None


async def test_a_run_begins_and_ends_once_another_program_unlocks_the_journal(
    engine, writer, locked, monkeypatch, caplog
):
    started, ended = asyncio.Event(), asyncio.Event()

    async def start(_variables):
        started.set()

    async def wait():
        await ended.wait()
        return 0

    monkeypatch.setattr(engine.supervisor.ranks, "start", start)
    monkeypatch.setattr(engine.supervisor.ranks, "wait", wait)
    engine.shared.next = StartOptions()
    with locked():
        run = asyncio.create_task(engine.supervisor.run())
        await until(lambda: "waiting for another program" in caplog.text)
        assert not started.is_set()
        (phase,) = engine.supervisor.status().phases  # which is read without the journal
        assert phase.waits_for == journal_wait.UNLOCKED_JOURNAL
    await asyncio.wait_for(started.wait(), 60)
    engine.shared.attempt.ended = Ended(step=0, reason="finished")
    engine.receive(Ready(info={}, settings=engine.shared.settings))
    caplog.clear()
    with locked():
        ended.set()
        await until(lambda: "waiting for another program" in caplog.text)
    assert await asyncio.wait_for(run, 60) == 0
    assert engine.state == "finished"
    with JournalReader(writer.session) as reader:
        assert reader.meta().state == "finished"


async def test_a_run_that_is_stopped_does_not_wait_long_for_a_locked_journal(
    engine, locked, monkeypatch
):
    monkeypatch.setattr(journal_wait, "STOP_TIMEOUT", 0.0)
    engine.shared.next, engine.shared.stopping = StartOptions(), True
    with locked(), pytest.raises(sqlite3.OperationalError, match="locked"):
        await asyncio.wait_for(engine.supervisor.run(), 60)


def test_a_step_that_is_written_when_there_is_room_again_has_its_metrics(writer):
    report = StepReport(step=1, metrics={"objective/kl": 1.0, "lr": 2.0}, samples=[], settings={})
    with no_room_for_files(), pytest.raises(sqlite3.OperationalError):
        writer.journal.record_step(report)
    assert writer.journal.step == 0
    writer.journal.record_step(report)
    assert writer.journal.step == 1
    with JournalReader(writer.session) as reader:
        assert [row.values for row in reader.metrics.rows()] == [report.metrics]


async def test_what_a_killed_attempt_reported_is_not_written_into_the_next(
    engine, writer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(journal_wait, "RETRY_INTERVAL", 0.01)
    killed = engine.shared.attempt
    server, _, to_engine = await rank_connection(engine, tmp_path)
    async with server:
        with no_room_for_files():
            to_engine.write(frames.encode(StepReport(step=3, metrics={}, samples=[], settings={})))
            await until(lambda: "waiting for room" in caplog.text)
            engine.shared.attempt = Attempt(StartOptions())
        writer.journal.begin_attempt(0, fresh=False)
        await until(lambda: not killed.is_connected(0))
        to_engine.close()
    with JournalReader(writer.session) as reader:
        assert reader.last_step() == 0


def full_once(monkeypatch, owner, path):
    """Lets the next call of a method, such as `commands.accept` of a journal, find a full disk."""
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    write = getattr(owner, name)

    def full(*_, **__):
        monkeypatch.setattr(owner, name, write)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(owner, name, full)


async def test_an_alert_is_published_once_though_the_disk_was_full(engine, writer, monkeypatch):
    report = StepReport(
        step=1, metrics={"time/step": 1.0, "objective/kl": 1e9}, samples=[], settings={"beta": 0.1}
    )
    full_once(monkeypatch, engine.supervisor.publisher, "alert")
    with pytest.raises(sqlite3.OperationalError):
        engine.receive(report)
    engine.receive(report)
    with JournalReader(writer.session) as reader:
        rules = [e.payload.rule for e in reader.events() if e.kind == "alert"]
        assert reader.last_step() == 1
    assert rules
    assert len(rules) == len(set(rules))


@pytest.mark.parametrize("write", ["commands.record", "commands.accept", "set_meta"])
async def test_the_pause_of_a_guard_rail_waits_for_room_like_its_alert(
    engine, writer, monkeypatch, write
):
    metrics = {"time/step": 1.0, NONFINITE_UPDATES: 1.0}
    report = StepReport(step=1, metrics=metrics, samples=[], settings=engine.shared.settings)
    full_once(monkeypatch, writer.journal, write)
    with pytest.raises(sqlite3.OperationalError):
        engine.receive(report)
    engine.receive(report)
    with JournalReader(writer.session) as reader:
        assert [e.kind for e in reader.events()].count("alert") == 1
        assert [(c.command, c.status) for c in reader.commands()] == [("pause", "accepted")]
        assert reader.meta().state == "pausing"
    apply_pending(engine)
    assert engine.supervisor.status().pause_reason.startswith("non_finite_updates")


@pytest.mark.parametrize("write", ["set_meta", "record_event"])
async def test_a_pause_of_the_ranks_is_told_once_though_the_disk_was_full(
    engine, writer, monkeypatch, write
):
    engine.receive(Ready(info={}, settings=engine.shared.settings))
    paused = Paused(step=2, rule="reward", reason="the judge is down", recovers=True)
    for message in (paused, Unpaused(step=2, rule="reward", text="the judge works again")):
        full_once(monkeypatch, writer.journal, write)
        with pytest.raises(sqlite3.OperationalError):
            engine.receive(message)
        engine.receive(message)
    with JournalReader(writer.session) as reader:
        events = [e.payload for e in reader.events() if e.kind in ("alert", "state")]
    told = [getattr(payload, "rule", "") or payload.state for payload in events]
    assert told[-4:] == ["reward", "paused", "reward", "running"]
    assert told.count("reward") == 2


@pytest.mark.parametrize("commands", [[Pause()], [Pause(), Unpause()]])
async def test_a_pause_that_began_or_ended_on_a_full_disk_is_recorded_later(
    engine, writer, monkeypatch, commands
):
    engine.receive(Ready(info={}, settings=engine.shared.settings))
    for command in commands:
        applied = Applied(id=engine.send(command).id, step=2)
        full_once(monkeypatch, writer.journal, "set_meta")
        with pytest.raises(sqlite3.OperationalError):
            engine.receive(applied)
        engine.receive(applied)
        with JournalReader(writer.session) as reader:
            states = [e.payload.state for e in reader.events() if e.kind == "state"]
        assert states[-1] == ("paused" if isinstance(command, Pause) else "running")
    assert engine.supervisor.pending.messages() == []


async def test_another_command_is_rejected_without_a_journal(engine):
    with no_room_for_files():
        reply = engine.send(SetBeta(value=0.2))
    assert reply.status == "rejected"
    assert reply.reason.startswith("cannot write the journal")
    assert engine.supervisor.pending.messages() == []


@pytest.mark.parametrize("failure", [None, Failed(rank=0, text="rank 0: a fault")])
async def test_an_end_that_cannot_be_recorded_is_told_with_what_is_saved(engine, writer, failure):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    attempt = engine.shared.attempt
    attempt.failure, attempt.ended = failure, None if failure else Ended(step=3, reason="finished")
    with no_room_for_files(), pytest.raises(SessionError) as caught:
        engine.supervisor.attempt_end.handle(1 if failure else 0)
    text = str(caught.value)
    assert text.startswith(failure.text if failure else "training has ended after step 3")
    assert "the steps up to 3 are recorded and the checkpoint of step 2 is complete" in text
    assert f"rlhf-tui resume {writer.session.name}" in text
