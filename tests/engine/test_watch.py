"""The watchdog's silence limits, and how an attempt ends after a failure."""

import asyncio
import os
import signal
import sqlite3
import threading
import time

import psutil
import pytest

from engine import starter
from engine.config import file as config_file
from engine.journal.reader import JournalReader
from engine.launch.start_options import StartOptions
from engine.monitoring.step_timer import OptimiseEnd, StepTimer
from engine.protocol.client_messages import Gpu
from engine.protocol.rank_messages import Failed, Notice, Phase, Ready
from engine.supervisor import watchdog as watchdog_module
from engine.supervisor.processes import rank_processes
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.server import Server
from engine.supervisor.supervisor import Supervisor
from engine.supervisor.watchdog import CHECK_INTERVAL, Watchdog
from tests.engine.supervised import until

SEVERAL = ("launch.nodes=2", "launch.rendezvous=10.0.0.1:29400")
ECHO = Failed(rank=0, text="rank 0 lost the others: timed out", traceback="where", echo=True)


@pytest.fixture
def watch(writer):
    """Creates a watchdog whose ranks are being started."""

    def make(*overrides):
        config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
        ranks = RankProcesses(writer.session, writer.session.folder / "x", config.launch)
        return Watchdog(writer.session, config, writer.journal, Server(), ranks)

    return make


def hung(watchdog, now=None):
    """The ranks that count as hung in one check; `now` on the clock of `time.monotonic`."""
    now = time.monotonic() if now is None else now
    found = []
    watchdog.check_silence(lambda rank, _seconds: found.append(rank), now)
    return found


def test_a_first_rank_that_never_connects_counts_as_hung(watch):
    assert hung(watch("launch.load_silence=1e-9")) == [0]


def test_ranks_that_wait_for_another_machine_do_not_count_as_hung(watch):
    assert hung(watch("launch.load_silence=1e-9", *SEVERAL)) == []


def test_a_rank_that_loads_has_a_limit_of_its_own(watch):
    watchdog = watch("launch.silence=1e-9")
    assert hung(watchdog) == []
    for rank in (0, 1):
        watchdog.rank_connected(rank)
        watchdog.message_received(rank, Phase(rank=rank, step=0, name="load policy"))
    watchdog.message_received(0, Notice(step=0, rule="memory", text="little is left"))
    assert hung(watchdog) == []


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, Ready(info={}, settings={})),
        (1, Phase(rank=1, step=1, name="generate")),
        (1, Phase(rank=1, step=0, name="paused")),
    ],
)
def test_a_rank_that_has_loaded_has_the_limit_of_steps(watch, rank, message):
    watchdog = watch("launch.silence=1e-9")
    watchdog.rank_connected(1)
    watchdog.message_received(rank, message)
    assert hung(watchdog) == [rank]


def test_a_rank_that_hangs_while_it_loads_counts_as_hung(watch):
    watchdog = watch("launch.load_silence=1e-9")
    watchdog.message_received(0, Ready(info={}, settings={}))
    watchdog.message_received(1, Phase(rank=1, step=0, name="load policy"))
    assert hung(watchdog) == [1]


def test_of_several_silent_ranks_the_one_that_fell_silent_first_counts_as_hung(watch):
    watchdog = watch("launch.load_silence=1e-9")
    for rank in (1, 0, 2):
        watchdog.rank_connected(rank)
    assert hung(watchdog) == [1]


def test_the_ranks_of_a_restart_load_again(watch):
    watchdog = watch("launch.silence=1e-9")
    watchdog.message_received(0, Ready(info={}, settings={}))
    assert hung(watchdog) == [0]
    watchdog.ranks_starting()
    assert hung(watchdog) == []


def test_a_supervisor_that_was_stopped_does_not_count_its_absence_as_silence(watch):
    watchdog = watch("launch.silence=60")
    watchdog.message_received(0, Ready(info={}, settings={}))
    woken = time.monotonic() + 1000
    assert hung(watchdog) == []
    assert hung(watchdog, woken) == []
    # Silence counts from one interval before it woke.
    checks = range(int(CHECK_INTERVAL), 100, int(CHECK_INTERVAL))
    assert next(t for t in checks if hung(watchdog, woken + t)) == 60 - CHECK_INTERVAL


async def test_a_hung_rank_is_noticed_though_no_alert_can_be_recorded(watch):
    watchdog = watch("launch.load_silence=1e-9", "guardrails.disk_free_gb=1e12")
    found = []

    def on_alert(_alert):
        raise sqlite3.OperationalError("database or disk is full")

    task = asyncio.create_task(watchdog.run(lambda rank, _seconds: found.append(rank), on_alert))
    await until(lambda: watchdog.latest is not None)
    task.cancel()
    assert found == [0]


async def test_a_condition_that_holds_again_raises_another_alert(watch, monkeypatch):
    monkeypatch.setattr(watchdog_module, "CHECK_INTERVAL", 0.001)
    watchdog, alerts = watch("guardrails.silent_rank=1e-9"), []
    task = asyncio.create_task(watchdog.run(lambda _rank, _seconds: None, alerts.append))
    await until(lambda: alerts)
    for count in (1, 2):
        assert [alert.rule for alert in alerts] == ["silent_rank"] * count
        watchdog.rank_disconnected(0)
        checked = watchdog.latest
        await until(lambda checked=checked: watchdog.latest is not checked)
        watchdog.rank_connected(0)
        await until(lambda count=count: len(alerts) > count)
    task.cancel()


async def test_a_check_that_fails_again_for_the_same_reason_is_logged_once(
    watch, monkeypatch, caplog
):
    monkeypatch.setattr(watchdog_module, "CHECK_INTERVAL", 0.001)
    watchdog = watch("guardrails.disk_free_gb=1e12")
    failures = ["database or disk is full"] * 20 + ["database is locked"] * 20

    def on_alert(_alert):
        raise sqlite3.OperationalError(failures.pop(0) if failures else "database is locked")

    task = asyncio.create_task(watchdog.run(lambda _rank, _seconds: None, on_alert))
    await until(lambda: not failures)
    task.cancel()
    assert [r.getMessage() for r in caplog.records if "cannot check" in r.getMessage()] == [
        "cannot check the session: database or disk is full",
        "cannot check the session: database is locked",
    ]


async def test_a_driver_that_does_not_answer_stops_no_check(watch, monkeypatch, caplog):
    """As after the failure of a GPU."""
    answers = threading.Event()
    gpu = Gpu(index=0, name="card", utilisation=5.0, memory_used=1, memory_total=2)

    class Reader:
        has_none = False

        def read(self):
            answers.wait()
            return [gpu]

    monkeypatch.setattr(watchdog_module, "GpuReader", Reader)
    monkeypatch.setattr(watchdog_module, "GPU_TIMEOUT", 0.01)
    monkeypatch.setattr(watchdog_module, "CHECK_INTERVAL", 0.001)
    watchdog, silent = watch("launch.load_silence=1e-9"), []

    def on_silence(rank, _seconds):
        silent.append(rank)

    task = asyncio.create_task(watchdog.run(on_silence, lambda _alert: None))
    await until(lambda: len(silent) > 3)
    assert watchdog.latest is not None and watchdog.latest.gpus == []
    assert caplog.text.count("driver has not answered") == 1
    answers.set()
    await until(lambda: watchdog.latest.gpus == [gpu])
    task.cancel()


def concluded(writer, failure, *, at_once=False):
    """The exit code of an attempt with this failure, and its supervisor."""

    async def conclude():
        session, socket = writer.session, writer.session.folder / "engine.sock"
        supervisor = Supervisor(session, session.config(), writer.journal, socket, StartOptions())
        supervisor.publisher.set_state("starting")
        state = supervisor.state
        state.next, state.attempt.failure, state.stop_now = None, failure, at_once
        return supervisor.attempt_end.handle(1), supervisor

    return asyncio.run(conclude())


@pytest.mark.parametrize("echo", [True, False])
def test_no_attempt_follows_a_stop_at_once(writer, echo):
    failure = Failed(rank=1, text="rank 1: a fault", echo=echo)
    code, supervisor = concluded(writer, failure, at_once=True)
    assert supervisor.state.next is None
    assert (code, supervisor.publisher.state) == ((0, "stopped") if echo else (1, "failed"))


def test_a_loss_of_all_other_ranks_is_the_cause_if_no_rank_reports_another(writer):
    concluded(writer, ECHO)
    with JournalReader(writer.session) as reader:
        (error,) = [e for e in reader.events() if e.kind == "error"]
    assert error.payload.text == ECHO.text
    assert error.payload.traceback == "where"


FAULT, OTHER = Failed(rank=1, text="rank 1: a fault"), Failed(rank=2, text="rank 2: another")


@pytest.mark.parametrize(
    "reports", [(ECHO, FAULT), (FAULT, ECHO), (FAULT, OTHER), (ECHO, FAULT, OTHER)]
)
async def test_the_cause_is_the_first_failure_that_is_no_consequence_of_another(
    engine, writer, reports
):
    for report in reports:
        engine.receive(report)
    engine.supervisor.attempt_end.handle(1)
    with JournalReader(writer.session) as reader:
        (error,) = [e for e in reader.events() if e.kind == "error"]
    assert error.payload.text == FAULT.text


async def test_a_rank_that_has_reported_its_failure_is_not_lost_without_a_reason(engine, writer):
    attempt = engine.shared.attempt
    attempt.rank_connected(0, None)
    engine.receive(ECHO)
    attempt.rank_disconnected(0)
    engine.supervisor.attempt_end.handle(1)
    with JournalReader(writer.session) as reader:
        (error,) = [e for e in reader.events() if e.kind == "error"]
    assert error.payload.text == ECHO.text


@pytest.mark.parametrize(("began", "code"), [(False, 2), (True, 1)])
async def test_the_users_input_is_to_blame_only_until_the_models_were_loaded(engine, began, code):
    engine.shared.began = began
    engine.receive(Failed(rank=0, text="data.prompts: no file", user_input=True))
    assert engine.supervisor.attempt_end.handle(1) == code


@pytest.mark.parametrize("reported", [True, False])
async def test_a_rank_that_is_silent_after_the_failure_of_another_is_not_the_cause(
    engine, writer, reported
):
    attempt = engine.shared.attempt
    attempt.rank_connected(1, None)
    if reported:
        attempt.record_failure(Failed(rank=1, text="rank 1: a fault"))
    attempt.rank_disconnected(1)
    engine.supervisor.on_silence(0, 9.0)
    engine.supervisor.attempt_end.handle(-9)
    with JournalReader(writer.session) as reader:
        (error,) = [e for e in reader.events() if e.kind == "error"]
    assert error.payload.text.startswith("rank 1: a fault" if reported else "rank 1 has ended")


# -- the processes that are killed -----------------------------------------------------------------


@pytest.fixture
async def outliving(writer, monkeypatch):
    """Two processes of ranks that outlive their agent, which ends at once; and how they end."""
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: ["true"])
    ranks = RankProcesses(
        writer.session, writer.session.folder / "x", writer.session.config().launch
    )
    await ranks.start({})
    sleepers = [
        await asyncio.create_subprocess_exec("sleep", "300", start_new_session=True)
        for _ in range(2)
    ]
    for rank, sleeper in enumerate(sleepers):
        ranks.rank_connected(rank, sleeper.pid)
    yield ranks, sleepers
    for sleeper in sleepers:
        if sleeper.returncode is None:
            sleeper.kill()
            await sleeper.wait()


async def test_a_process_that_has_the_id_of_a_rank_by_now_is_not_killed(outliving, monkeypatch):
    ranks, (other, own) = outliving
    runs = psutil.Process.is_running
    monkeypatch.setattr(psutil.Process, "is_running", lambda p: p.pid != other.pid and runs(p))
    await ranks.wait()
    assert await own.wait() == -signal.SIGKILL
    assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE


async def test_a_group_that_may_not_be_killed_does_not_spare_the_others(outliving, monkeypatch):
    ranks, sleepers = outliving
    refused, kill = [], os.killpg

    def refuse_once(group, number):
        if group in (s.pid for s in sleepers) and not refused:
            refused.append(group)
            raise PermissionError
        kill(group, number)

    monkeypatch.setattr(os, "killpg", refuse_once)
    assert await ranks.wait() == 0
    (own,) = [s for s in sleepers if s.pid not in refused]
    assert await own.wait() == -signal.SIGKILL


# -- the time left of a step -----------------------------------------------------------------------


def test_the_time_left_follows_the_epochs_not_the_steps_before():
    """`epochs` was raised: a stop then says how long the step really takes."""
    now = 0.0
    timer = StepTimer(lambda: now)
    now = 10.0
    timer.finish_step()
    for seconds, done in ((12.0, 0), (13.0, 1), (22.0, 10)):
        now = seconds
        timer.phase(Phase(rank=0, step=2, name="optimise", done=done, total=4000))
    assert timer.remaining() == pytest.approx(3990)
    for seconds, done in ((30.0, 0), (40.0, 100)):  # repeated with a smaller micro-batch
        now = seconds
        timer.phase(Phase(rank=0, step=2, name="optimise", done=done, total=4000))
    assert timer.remaining() == pytest.approx(390)
    timer.finish_step()
    assert timer.remaining() == pytest.approx(0.7 * 10 + 0.3 * 30)  # the mean of both steps


def test_the_end_of_optimise_follows_its_progress_and_not_the_steps_before():
    end = OptimiseEnd()
    for done, now in ((0, 10.0), (2, 14.0)):
        end.take(Phase(rank=0, step=7, name="optimise", done=done, total=10), now)
    assert end.ends == 30.0
    end.take(Phase(rank=0, step=8, name="generate"), 31.0)
    assert end.ends is None


def test_an_optimise_that_is_joined_midway_is_timed_from_there():
    end = OptimiseEnd()
    for done, now in ((6, 10.0), (6, 12.0), (8, 14.0)):
        end.take(Phase(rank=0, step=7, name="optimise", done=done, total=10), now)
    assert end.ends == 18.0


def test_an_optimise_that_begins_again_is_timed_from_its_new_beginning():
    """As it does with a smaller micro-batch, after the step ran out of memory."""
    end = OptimiseEnd()
    for done, now in ((0, 10.0), (6, 12.0), (0, 20.0), (2, 24.0)):
        end.take(Phase(rank=0, step=7, name="optimise", done=done, total=10), now)
    assert end.ends == 40.0
