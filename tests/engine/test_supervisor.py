"""What a supervisor makes of orders, alerts and its ranks' words; prepared without ranks."""

import asyncio
import signal
import sqlite3
from contextlib import closing

import pytest

from engine.attempt import Attempt
from engine.client import new_id
from engine.commands import Beta, Control, Pause, Rollback, Stop, Unpause
from engine.control import Request
from engine.guardrails import Alert
from engine.launcher import Ranks
from engine.protocol import Applied, CheckpointComplete, CheckpointWritten, Ready
from engine.record import Record
from engine.start import Start, last_checkpoint
from engine.supervisor import Supervisor
from engine.watch import Watchman


@pytest.fixture
async def supervisor(writer):
    """One that says it runs; in a loop, which its server needs."""
    config = writer.session.config()
    made = Supervisor(writer.session, Start())
    made._journal, made._next = writer.journal, None
    made._prepare(config)
    made._ranks = Ranks(writer.session, writer.session.folder / "engine.sock", config.launch)
    made._watchman = Watchman(writer.session, config, writer.journal, made._server)
    made._herald.set_state("running")
    return made


def ask(supervisor, command):
    return supervisor.answer(Request(id=new_id(), command=command), "me")


def state(supervisor):
    return supervisor._herald.state


# -- to stop ---------------------------------------------------------------------------------------


async def test_a_stop_at_once_is_not_lost_in_a_roll_back_under_way(supervisor, writer):
    writer.checkpoint(2)
    assert ask(supervisor, Rollback(step=2)).status == "applied"
    assert ask(supervisor, Stop(now=True)).status == "applied"
    assert supervisor._next is None
    assert supervisor._conclude(-signal.SIGKILL) == 0
    assert state(supervisor) == "stopped"


async def test_a_run_that_is_to_stop_at_once_is_not_rolled_back(supervisor, writer):
    writer.checkpoint(2)
    ask(supervisor, Stop(now=True))
    answer = ask(supervisor, Rollback(step=2))
    assert (answer.status, supervisor._next) == ("rejected", None)
    assert "stopping" in answer.reason


async def test_ranks_that_were_to_end_before_they_had_begun_are_ended(supervisor):
    trying = asyncio.create_task(supervisor._try(Start()))
    await asyncio.sleep(0)  # it is starting a process now, which cannot be killed yet
    ask(supervisor, Stop(now=True))
    assert await trying == 0
    assert supervisor._ranks._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("orders", [[Pause()], [Pause(), Unpause()]])
async def test_what_is_carried_out_on_the_way_to_a_stop_does_not_hide_it(supervisor, orders):
    answers = [ask(supervisor, order) for order in orders]
    ask(supervisor, Stop())
    for answer in answers:
        supervisor._applied(Applied(id=answer.id, step=2))
        assert state(supervisor) == "stopping"


# -- guard rails -----------------------------------------------------------------------------------


async def test_a_guard_rail_stops_a_run_that_is_about_to_pause(supervisor):
    ask(supervisor, Pause())
    assert state(supervisor) == "pausing"
    supervisor._on_alert(Alert("much", "stop", "look here", 3))
    assert state(supervisor) == "stopping"


@pytest.mark.parametrize("ending", ["stopping", "finished"])
async def test_a_guard_rail_asks_nothing_of_a_run_that_ends(supervisor, writer, ending):
    supervisor._herald.set_state(ending)
    supervisor._on_alert(Alert("much", "stop", "look here", 3))
    with Record(writer.session) as record:
        assert record.commands() == []


# -- refusals --------------------------------------------------------------------------------------


async def test_a_live_run_is_steered_by_its_own_configuration_not_by_a_file(supervisor, writer):
    writer.session.config_file.write_text("not: [ours")
    assert ask(supervisor, Beta(value=0.2)).status == "accepted"
    answer = ask(supervisor, Control(controller="adaptive", horizon=0.1))
    assert "a fifth of the batch" in answer.reason


async def test_a_command_that_cannot_be_looked_into_is_rejected_and_says_why(supervisor, writer):
    with closing(sqlite3.connect(writer.session.samples_file)) as db:
        db.execute("PRAGMA user_version = 99")
    answer = ask(supervisor, Rollback(step=2))
    assert answer.status == "rejected"
    assert "samples.db" in answer.reason


async def test_only_ranks_that_were_ready_can_have_failed_by_an_order(supervisor):
    order = ask(supervisor, Beta(value=0.2))
    for ready in (False, True, True):
        assert [o.id for o in supervisor._orders.all()] == [order.id]
        supervisor._attempt = Attempt(Start())
        if ready:
            supervisor._handle(Ready(info={}, settings=supervisor._settings))
        supervisor._conclude(-signal.SIGKILL)
    assert supervisor._orders.all() == []
    assert "failed 2 times" in supervisor._journal.answer(order.id).reason


# -- checkpoints -----------------------------------------------------------------------------------


async def test_an_older_checkpoint_serves_until_the_one_it_makes_way_for_is_whole(
    supervisor, writer
):
    writer.checkpoint(2)
    supervisor._handle(CheckpointWritten(step=4, size=1, score=0.0, kl=0.0))
    assert last_checkpoint(writer.session) == 2
    supervisor._handle(CheckpointComplete(step=4, removed=[2]))
    with Record(writer.session) as record:
        assert [c["step"] for c in record.checkpoints()] == [4]
