"""A rank that hangs is detected and restarted; a paused rank is not."""

import signal
import time

import pytest

from engine.protocol.commands import Note
from tests.waiting import until

SILENCE = 15.0
"""`launch.silence` in seconds: several times the interval between two reports of a paused rank.
Loading has a separate limit."""
ALERT = 9.0
"""`guardrails.silent_rank` in seconds. After a suspension a rank that reports every two seconds
counts as silent for up to seven: the time between two checks is not told from an absence. A check,
every five seconds, must find a hung rank between the two limits."""


@pytest.fixture(scope="module")
def quiet(either_lab):
    """A run that is paused for longer than `launch.silence`; then its rank gets SIGSTOP."""
    limits = (f"launch.silence={SILENCE}", f"guardrails.silent_rank={ALERT}")
    run = either_lab.run("quiet", *limits, steps=1000)
    run.start()
    run.command("pause")
    # Loading may have taken longer than silent_rank, which alerts but does not restart the run.
    before, starts = len(run.events("alert")), len(run.events("attempt"))
    began = time.monotonic()
    run.paused_at = run.step
    until(lambda: time.monotonic() > began + 1.5 * SILENCE, "end of a long pause")
    run.attempts_after_pause = len(run.events("attempt"))
    run.alerts_after_pause = [e["rule"] for e in run.events("alert")][before:]
    run.restarts_in_pause = run.attempts_after_pause - starts
    run.step_after_pause = run.step
    rank, supervisor = run.rank(), run.engine()
    # A suspended machine: neither runs, and the supervisor wakes first.
    frozen = time.monotonic()
    for process in (supervisor, rank):
        process.send_signal(signal.SIGSTOP)
    until(lambda: time.monotonic() > frozen + 1.5 * SILENCE, "end of a suspension")
    supervisor.send_signal(signal.SIGCONT)
    run.send(Note(text="awake"))  # answered after the check that was due
    rank.send_signal(signal.SIGCONT)
    run.command("checkpoint")
    run.attempts_after_suspension = len(run.events("attempt"))
    run.alerts_after_suspension = [e["rule"] for e in run.events("alert")][before:]
    run.alerts_before_hang = len(run.events("alert"))
    rank.send_signal(signal.SIGSTOP)
    until(lambda: len(run.events("attempt")) > run.attempts_after_pause, "another attempt")
    run.wait_for("paused")
    run.second_rank, run.first_rank = run.rank().pid, rank.pid
    yield run
    run.end()


def test_a_long_pause_is_not_silence(quiet):
    assert quiet.restarts_in_pause == 0
    assert not {"silent_rank", "restart"} & set(quiet.alerts_after_pause)
    assert quiet.step_after_pause == quiet.paused_at


def test_a_suspended_machine_is_not_taken_for_silent_ranks(quiet):
    assert quiet.attempts_after_suspension == quiet.attempts_after_pause
    assert "silent_rank" not in quiet.alerts_after_suspension


def test_a_rank_that_hangs_is_reported_and_restarted(quiet):
    rules = [e["rule"] for e in quiet.events("alert")][quiet.alerts_before_hang :]
    assert rules.index("silent_rank") < rules.index("restart")
    assert quiet.second_rank != quiet.first_rank


def test_a_run_that_was_paused_is_paused_again_after_the_restart(quiet):
    assert quiet.state == "paused"
