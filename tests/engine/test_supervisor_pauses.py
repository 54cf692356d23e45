"""Pauses: who began one, its reason, and what ends it; without rank processes."""

import signal

from engine.journal.reader import JournalReader
from engine.launch.start_options import StartOptions
from engine.protocol.commands import Pause, Unpause
from engine.protocol.rank_messages import (
    Paused,
    Ready,
    Unpaused,
)
from engine.supervisor.attempt import Attempt
from tests.engine.supervised import apply_pending, begin_of

OUTAGE = Paused(step=3, rule="reward", reason="no service", recovers=True)


async def test_a_pause_that_was_taken_back_is_no_longer_shown(engine):
    engine.receive(Ready(info={}, settings=engine.shared.settings))
    engine.send(Pause())
    engine.send(Unpause())
    assert engine.state == "running"


async def test_a_run_that_loads_is_not_shown_as_running_after_a_pause_was_taken_back(engine):
    engine.send(Pause())
    engine.send(Unpause())
    assert engine.state == "starting"


async def test_a_guard_rail_stops_a_run_that_is_about_to_pause(engine):
    engine.send(Pause())
    assert engine.state == "pausing"
    engine.alert("stop")
    assert engine.state == "stopping"


def pause_reasons(engine, writer):
    """The reason of the pause in the live status and in the journal."""
    with JournalReader(writer.session) as reader:
        return {engine.supervisor.status().pause_reason, reader.meta().pause_reason}


async def test_a_pause_by_a_guard_rail_has_its_reason_until_it_is_ended(engine, writer):
    engine.alert("pause")
    assert pause_reasons(engine, writer) == {None}
    apply_pending(engine)
    assert pause_reasons(engine, writer) == {"much at step 3: too much"}
    engine.supervisor.publisher.set_state("starting")  # its ranks died and are started again
    engine.receive(Ready(info={}, settings=engine.shared.settings))
    assert engine.state == "paused"
    assert pause_reasons(engine, writer) == {"much at step 3: too much"}
    engine.send(Unpause())
    apply_pending(engine)
    assert pause_reasons(engine, writer) == {None}


async def test_a_pause_by_a_person_has_no_reason_whatever_alerts_meanwhile(engine, writer):
    engine.send(Pause())
    engine.alert("pause")
    apply_pending(engine)
    assert engine.state == "paused"
    assert pause_reasons(engine, writer) == {None}


async def test_a_pause_that_the_ranks_began_is_shown_and_can_be_ended(engine, writer):
    engine.receive(Paused(step=3, rule="reward", reason="reward 'score' at step 4: ValueError"))
    assert engine.state == "paused"
    assert pause_reasons(engine, writer) == {"reward 'score' at step 4: ValueError"}
    assert engine.send(Unpause()).status == "accepted"
    apply_pending(engine)
    assert engine.state == "running"
    assert pause_reasons(engine, writer) == {None}


async def test_a_pause_that_the_ranks_end_themselves_is_shown_as_ended(engine, writer):
    engine.receive(OUTAGE)
    assert pause_reasons(engine, writer) == {"no service"}
    engine.receive(Unpaused(step=3, rule="reward", text="it works again"))
    assert engine.state == "running"
    assert pause_reasons(engine, writer) == {None}


async def test_a_pause_that_would_end_by_itself_can_be_turned_into_a_persons(engine, writer):
    engine.receive(OUTAGE)
    assert engine.send(Pause()).status == "accepted"
    assert engine.state == "pausing"
    assert engine.send(Pause()).status == "rejected"
    apply_pending(engine)
    assert engine.state == "paused"
    assert pause_reasons(engine, writer) == {None}
    assert not engine.shared.pause_recovers


async def test_a_persons_pause_stays_if_the_ranks_end_theirs_before_it_arrives(engine, writer):
    engine.receive(OUTAGE)
    engine.send(Pause())
    engine.receive(Unpaused(step=3, rule="reward", text="it works again"))
    assert engine.state == "pausing"
    apply_pending(engine)
    assert engine.state == "paused"
    assert pause_reasons(engine, writer) == {None}


async def test_a_pause_survives_failures_of_the_ranks(engine, writer):
    sent = engine.send(Pause())
    for _ in range(3):
        engine.shared.attempt = Attempt(StartOptions())
        engine.receive(Ready(info={}, settings=engine.shared.settings))
        engine.supervisor.attempt_end.handle(-signal.SIGKILL)
    assert [m.id for m in engine.supervisor.pending.messages()] == [sent.id]


async def test_ranks_begin_paused_unless_the_pause_would_have_ended_by_itself(engine, tmp_path):
    engine.shared.paused = True
    assert (await begin_of(engine, tmp_path)).paused
    engine.receive(OUTAGE)
    (tmp_path / "link.sock").unlink(missing_ok=True)  # Python 3.13 has removed it
    assert not (await begin_of(engine, tmp_path)).paused
    assert not engine.shared.paused
