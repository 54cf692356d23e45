"""A pause that ends by itself, and what turns it into one that does not."""

import socket
import threading

import pytest

from engine.protocol.commands import Checkpoint, Pause, Stop
from engine.protocol.rank_messages import (
    Applied,
    Begin,
    Paused,
    RankCommand,
    RankHello,
    Rejected,
    Unpaused,
)
from engine.train.boundary import Boundary
from engine.train.rewards import recovery
from engine.train.rewards.recovery import Recovery
from engine.train.rewards.source import RewardCallError
from tests.train.supervisor_end import DEADLINE


@pytest.fixture
def held(make_run, supervisor, link, monkeypatch):
    """Returns a function that makes a boundary which is paused for a source."""
    monkeypatch.setattr(recovery, "FIRST_INTERVAL", 0.01)
    run, session = make_run()
    supervisor.wait_for(RankHello)
    boundaries = []

    def hold(works_again, begin=None):
        boundary = Boundary(session, run, begin or Begin(attempt=1, from_step=0), link)
        boundaries.append(boundary)
        boundary.pause_before_step(
            RewardCallError("no service", recovers=True, works_again=works_again)
        )
        return boundary, supervisor

    yield hold
    for boundary in boundaries:
        boundary.close()
    supervisor.peer.shutdown(socket.SHUT_RDWR)
    supervisor.listener.close()


def before_step(boundary):
    """Runs :meth:`before_step` in a thread; returns the thread."""
    thread = threading.Thread(target=boundary.before_step, daemon=True)
    thread.start()
    return thread


def test_a_step_is_repeated_once_the_source_works_again(held):
    replies = [True, False, False]
    boundary, supervisor = held(replies.pop)
    assert boundary.before_step()
    assert replies == []
    assert supervisor.wait_for(Paused).reason.startswith("no service; the run resumes by itself")
    assert supervisor.wait_for(Unpaused).step == 0


def test_a_step_is_repeated_when_a_try_fails_in_another_way(held):
    def works_again():
        raise RuntimeError("can't start new thread")

    boundary, supervisor = held(works_again)
    waiting = before_step(boundary)
    assert supervisor.wait_for(Unpaused).step == 0
    waiting.join(DEADLINE)
    assert not waiting.is_alive()


@pytest.mark.parametrize("paused_before", [False, True])
def test_a_persons_pause_is_not_ended_by_a_source_that_works_again(held, paused_before):
    back, asked = threading.Event(), threading.Event()

    def works_again():
        asked.set()
        return back.wait(DEADLINE)  # a try that is under way when the person pauses

    begin = Begin(attempt=1, from_step=0, paused=paused_before)
    boundary, supervisor = held(works_again, begin)
    waiting = before_step(boundary)
    if not paused_before:
        assert asked.wait(DEADLINE)
        supervisor.send(RankCommand(id="a", command=Pause()))
        supervisor.wait_for(Applied)
    back.set()
    supervisor.send(RankCommand(id="b", command=Checkpoint()))
    supervisor.wait_for(Rejected)  # by a boundary that had the time to end the pause
    assert waiting.is_alive()
    assert supervisor.of(Unpaused) == []
    supervisor.send(RankCommand(id="c", command=Stop()))
    waiting.join(DEADLINE)
    assert not waiting.is_alive()


def test_tries_end_when_the_source_is_not_waited_for_any_more(monkeypatch):
    monkeypatch.setattr(recovery, "FIRST_INTERVAL", DEADLINE)
    waiting = Recovery(lambda: True)
    waiting.cancel()
    assert not waiting.recovered
