"""What a supervisor makes of commands, alerts and its ranks' messages; prepared without ranks."""

import asyncio
import resource
import signal
import sqlite3
from contextlib import closing, contextmanager

import pytest

from engine.journal.reader import JournalReader
from engine.launch.start import StartOptions, last_checkpoint
from engine.monitoring.guardrails import Alert
from engine.protocol.client import new_id
from engine.protocol.client_messages import CommandRequest
from engine.protocol.commands import Pause, Rollback, SetBeta, SetKLController, Stop, Unpause
from engine.protocol.rank_messages import Applied, CheckpointComplete, CheckpointWritten, Ready
from engine.supervisor.attempt import Attempt
from engine.supervisor.supervisor import Supervisor


class Engine:
    """A supervisor of one live session that says it runs."""

    def __init__(self, writer):
        session = writer.session
        socket = session.folder / "engine.sock"
        self.supervisor = Supervisor(
            session, session.config(), writer.journal, socket, StartOptions()
        )
        self.live = self.supervisor.state
        self.live.next = None
        self.supervisor.publisher.set_state("starting")
        self.supervisor.publisher.set_state("running")

    def ask(self, command):
        return self.supervisor.commands.handle(CommandRequest(id=new_id(), command=command), "me")

    def hear(self, message):
        self.supervisor.rank_messages.handle(message)

    def alert(self, action):
        self.supervisor.commands.on_alert(Alert("much", action, "too much", 3))

    @property
    def state(self):
        return self.supervisor.publisher.state


@pytest.fixture
async def engine(writer):
    """One that says it runs; in a loop, which its server needs."""
    return Engine(writer)


# -- to pause --------------------------------------------------------------------------------------


async def test_commands_are_checked_against_the_state_at_the_boundary(engine):
    commands = (Pause(), Pause(), Unpause(), Unpause(), Pause())
    replies = [engine.ask(command) for command in commands]
    expected = ["accepted", "rejected", "accepted", "rejected", "accepted"]
    assert [reply.status for reply in replies] == expected
    assert engine.state == "pausing"
    for reply in replies:
        if reply.status == "accepted":
            engine.hear(Applied(id=reply.id, step=1))
    assert engine.state == "paused"


async def test_a_pause_that_was_taken_back_is_no_longer_shown(engine):
    engine.ask(Pause())
    engine.ask(Unpause())
    assert engine.state == "running"


# -- to stop ---------------------------------------------------------------------------------------


async def test_a_stop_at_once_is_not_lost_in_a_roll_back_under_way(engine, writer):
    writer.checkpoint(2)
    assert engine.ask(Rollback(step=2)).status == "applied"
    assert engine.ask(Stop(now=True)).status == "applied"
    assert engine.live.next is None
    assert engine.supervisor.conclude(-signal.SIGKILL) == 0
    assert engine.state == "stopped"


async def test_a_run_that_is_to_stop_at_once_is_not_rolled_back(engine, writer):
    writer.checkpoint(2)
    engine.ask(Stop(now=True))
    answer = engine.ask(Rollback(step=2))
    assert (answer.status, engine.live.next) == ("rejected", None)
    assert "stopping" in answer.reason


async def test_ranks_that_were_to_end_before_they_had_begun_are_ended(engine):
    trying = asyncio.create_task(engine.supervisor.attempt(StartOptions()))
    await asyncio.sleep(0)  # it is starting a process now, which cannot be killed yet
    engine.ask(Stop(now=True))
    assert await trying == 0
    assert await engine.supervisor.ranks.wait() == -signal.SIGKILL


@pytest.mark.parametrize("orders", [[Pause()], [Pause(), Unpause()]])
async def test_what_is_carried_out_on_the_way_to_a_stop_does_not_hide_it(engine, orders):
    answers = [engine.ask(order) for order in orders]
    engine.ask(Stop())
    for answer in answers:
        engine.hear(Applied(id=answer.id, step=2))
        assert engine.state == "stopping"


# -- a journal that cannot be written --------------------------------------------------------------


@contextmanager
def no_room_for_files():
    """No file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_stop_at_once_needs_no_journal(engine):
    with no_room_for_files():
        reply = engine.ask(Stop(now=True))
    assert reply.status == "applied"
    assert reply.reason.startswith("cannot write the journal")
    assert engine.live.stop_now


async def test_a_stop_reaches_the_ranks_without_a_journal_and_is_recorded_later(engine, writer):
    with no_room_for_files():
        engine.supervisor.commands.on_signal(signal.SIGTERM)
        assert engine.ask(Stop()).reason == "the run is stopping already"
    (command,) = engine.supervisor.pending.messages()
    assert command.command == Stop()
    assert engine.state == "stopping"
    engine.hear(Applied(id=command.id, step=4))
    with JournalReader(writer.session) as record:
        assert [(c.who, c.status) for c in record.commands()] == [("SIGTERM", "applied")]


async def test_another_command_is_rejected_without_a_journal(engine):
    with no_room_for_files():
        reply = engine.ask(SetBeta(value=0.2))
    assert reply.status == "rejected"
    assert reply.reason.startswith("cannot write the journal")
    assert engine.supervisor.pending.messages() == []


# -- guard rails -----------------------------------------------------------------------------------


async def test_a_guard_rail_stops_a_run_that_is_about_to_pause(engine):
    engine.ask(Pause())
    assert engine.state == "pausing"
    engine.alert("stop")
    assert engine.state == "stopping"


@pytest.mark.parametrize("ending", ["stopping", "finished"])
async def test_a_guard_rail_asks_nothing_of_a_run_that_ends(engine, writer, ending):
    engine.supervisor.publisher.set_state(ending)
    engine.alert("stop")
    with JournalReader(writer.session) as record:
        assert record.commands() == []


# -- refusals --------------------------------------------------------------------------------------


async def test_a_live_run_is_steered_by_its_own_configuration_not_by_a_file(engine, writer):
    writer.session.config_file.write_text("not: [ours")
    assert engine.ask(SetBeta(value=0.2)).status == "accepted"
    answer = engine.ask(SetKLController(controller="adaptive", horizon=0.1))
    assert "a fifth of the batch" in answer.reason


async def test_a_command_that_cannot_be_looked_into_is_rejected_and_says_why(engine, writer):
    with closing(sqlite3.connect(writer.session.samples_file)) as db:
        db.execute("PRAGMA user_version = 99")
    answer = engine.ask(Rollback(step=2))
    assert answer.status == "rejected"
    assert "samples.db" in answer.reason


async def test_only_ranks_that_were_ready_can_have_failed_by_a_command(engine, writer):
    order = engine.ask(SetBeta(value=0.2))
    for ready in (False, True, True):
        assert [o.id for o in engine.supervisor.pending.messages()] == [order.id]
        engine.live.attempt = Attempt(StartOptions())
        if ready:
            engine.hear(Ready(info={}, settings=engine.live.settings))
        engine.supervisor.conclude(-signal.SIGKILL)
    assert engine.supervisor.pending.messages() == []
    assert "failed 2 times" in writer.journal.commands.reply(order.id).reason


# -- checkpoints -----------------------------------------------------------------------------------


async def test_an_older_checkpoint_serves_until_the_one_it_makes_way_for_is_whole(engine, writer):
    writer.checkpoint(2)
    engine.hear(CheckpointWritten(step=4, size=1, score=0.0, kl=0.0))
    assert last_checkpoint(writer.session) == 2
    engine.hear(CheckpointComplete(step=4, removed=[2]))
    with JournalReader(writer.session) as record:
        assert [c.step for c in record.checkpoints()] == [4]
