"""When silence, a last word or an order to stop ends a run, and what is said of it."""

import asyncio

import pytest

from engine import starter
from engine.config import file as config_file
from engine.journal.reader import JournalReader
from engine.launch.start import StartOptions
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Failed
from engine.supervisor.state import SupervisorState
from engine.supervisor.supervisor import Supervisor
from engine.supervisor.watchdog import Watchdog

SEVERAL = ("launch.nodes=2", "launch.rendezvous=10.0.0.1:29400")
ECHO = Failed(rank=0, text="rank 0 lost the others: timed out", traceback="where", echo=True)


def silent_after_a_start(writer, *overrides):
    """The ranks that are taken for hung before any has said a word."""
    config = config_file.load(starter.FOLDER / "demo.yaml", ["launch.silence=1e-9", *overrides])
    watchman = Watchdog(writer.session, config, writer.journal, None)
    look = Telemetry(time=0.0, cpu=0.0, memory_used=0, memory_total=0, disk_free=10**12)
    hung = []
    watchman._check(look, lambda rank, _seconds: hung.append(rank), lambda _alert: None)
    return hung


def test_a_first_rank_that_never_speaks_is_taken_for_hung(writer):
    assert silent_after_a_start(writer) == [0]


def test_ranks_that_wait_for_another_machine_are_not(writer):
    assert silent_after_a_start(writer, *SEVERAL) == []


def ended(writer, failure, *, at_once=False):
    """The exit code of ranks that have ended, one of them with these last words; and how it is."""

    async def conclude():
        session, socket = writer.session, writer.session.folder / "engine.sock"
        live = SupervisorState.of(
            session, session.config(), writer.journal, socket, StartOptions(), None
        )
        live.herald.set_state("starting")
        live.next, live.attempt.failure, live.stop_now = None, failure, at_once
        return Supervisor(live).conclude(1), live

    return asyncio.run(conclude())


@pytest.mark.parametrize("echo", [True, False])
def test_a_run_that_is_to_stop_at_once_is_not_started_again(writer, echo):
    failure = Failed(rank=1, text="rank 1: a fault", echo=echo)
    code, live = ended(writer, failure, at_once=True)
    assert live.next is None
    assert (code, live.herald.state) == ((0, "stopped") if echo else (1, "failed"))


def test_where_all_ranks_of_a_machine_waited_in_vain_the_first_to_say_so_is_heard(writer):
    ended(writer, ECHO)
    with JournalReader(writer.session) as record:
        (error,) = [e for e in record.events() if e["kind"] == "error"]
    assert error["text"] == ECHO.text
    assert error["traceback"] == "where"
