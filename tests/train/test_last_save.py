"""The save of a run's last step: before a deadline, and on a full disk."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.config import file as config_file
from engine.errors import CheckpointError
from engine.protocol.commands import SetBeta, Stop
from engine.protocol.rank_messages import (
    LAST_SAVE_WAITS,
    ROOM,
    Applied,
    Begin,
    Ended,
    Notice,
    Phase,
    Preempted,
    RankCommand,
    RankHello,
    Rejected,
)
from engine.session.checkpoints import complete_checkpoints
from engine.train import boundary as boundary_module
from engine.train.boundary import PAUSE_POLL_INTERVAL, Boundary
from engine.train.checkpoints import folder as checkpoint_folder
from tests.train.supervisor_end import METRICS
from tests.waiting import LONG, until


def test_a_run_whose_last_save_fails_has_not_ended_regularly(trained, monkeypatch):
    _, _, boundary, supervisor = trained

    def broken(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_folder, "publish", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        boundary.finish()
    assert not supervisor.of(Ended)


@pytest.fixture
def full_disk(trained, monkeypatch):
    """The run as it waits for room to save its last step, and an event that makes room."""
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    room, publish = threading.Event(), checkpoint_folder.publish

    def publish_if_room(*args):
        if not room.is_set():
            raise OSError(28, "No space left on device")
        return publish(*args)

    monkeypatch.setattr(checkpoint_folder, "publish", publish_if_room)
    monkeypatch.setattr(boundary_module, "SAVE_RETRY_INTERVAL", PAUSE_POLL_INTERVAL)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(boundary.finish)
        yield session, supervisor, room, end
        room.set()


def is_waiting(supervisor):
    return any(phase.waits_for == ROOM for phase in supervisor.of(Phase))


def test_a_run_waits_for_room_to_save_its_last_step(full_disk):
    session, supervisor, room, end = full_disk
    until(lambda: is_waiting(supervisor))
    failed_saves = len([p for p in supervisor.of(Phase) if p.name == "checkpoint"])
    until(lambda: len([p for p in supervisor.of(Phase) if p.name == "checkpoint"]) > failed_saves)
    assert not end.done()
    rules = [notice.rule for notice in supervisor.of(Notice)]
    assert rules == ["checkpoint", LAST_SAVE_WAITS]  # whatever the number of attempts
    room.set()
    assert end.result(LONG) == "finished"
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_while_the_last_step_waits_for_room_a_stop_is_accepted_and_nothing_else(full_disk):
    _, supervisor, room, end = full_disk
    until(lambda: is_waiting(supervisor))
    supervisor.send(RankCommand(id="stop", command=Stop()))
    supervisor.send(RankCommand(id="beta", command=SetBeta(value=0.2)))
    assert supervisor.wait_for(Rejected).id == "beta"
    assert not end.done()
    room.set()
    assert end.result(LONG) == "finished"
    assert supervisor.wait_for(Applied).id == "stop"


def test_a_signal_of_a_scheduler_ends_the_wait_for_room_after_one_more_attempt(full_disk):
    session, supervisor, _, end = full_disk
    until(lambda: is_waiting(supervisor))
    supervisor.send(Preempted())
    with pytest.raises(CheckpointError, match=r"No space left.*step 1, .* is not saved: resume"):
        end.result(LONG)
    assert not complete_checkpoints(session.checkpoints)
    assert not supervisor.of(Ended)


def test_a_step_for_which_there_is_room_by_then_is_saved_after_the_signal(full_disk):
    session, supervisor, room, end = full_disk
    until(lambda: is_waiting(supervisor))
    room.set()
    supervisor.send(Preempted())
    assert end.result(LONG) == "finished"
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_a_run_that_must_end_before_its_deadline_does_not_wait_for_room(
    until_deadline, supervisor, monkeypatch
):
    def no_room(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    _, boundary = until_deadline(5)
    boundary.after_step(1, dict(METRICS), 1.0)
    assert not boundary.before_step()
    monkeypatch.setattr(checkpoint_folder, "publish", no_room)
    with pytest.raises(CheckpointError, match="No space left"):
        boundary.finish()


@pytest.fixture
def until_deadline(shared_run, supervisor, link):
    """Makes the boundary of a run whose deadline is so many seconds from now."""
    made = []
    supervisor.wait_for(RankHello)

    def make(seconds, *, paused=False):
        run, session = shared_run()
        ends = f"train.save_before_deadline={int(time.time()) + seconds}"
        run.config = config_file.override(run.config, [ends, "train.deadline_margin=10"])
        begin = Begin(attempt=1, from_step=0, paused=paused)
        made.append(Boundary(session, run, begin, link))
        supervisor.may_confirm.set()
        return session, made[-1]

    yield make
    for boundary in made:
        boundary.close()
    supervisor.peer.shutdown(socket.SHUT_RDWR)
    supervisor.listener.close()


def test_a_run_saves_and_ends_when_another_step_would_not_end_before_its_deadline(
    until_deadline, supervisor
):
    session, boundary = until_deadline(1000)
    boundary.after_step(1, dict(METRICS), 900.0)
    assert boundary.before_step()
    boundary.after_step(2, dict(METRICS), 995.0)  # 5 s are left, less than the margin
    assert not boundary.before_step()
    boundary.finish()
    assert supervisor.wait_for(Ended).reason == "deadline"
    assert [*complete_checkpoints(session.checkpoints)] == [2]


def test_a_paused_run_ends_before_its_deadline_too(until_deadline):
    _, boundary = until_deadline(5, paused=True)
    assert not boundary.before_step()
