"""Two ranks: steered as one, paused for long, ended as one when one of them fails."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.lab import LONG

TWO = ("launch.processes=2", "launch.threads=1")
FAULTS = Path(__file__).with_name("faults")
PATIENCE = 10.0
"""Seconds of `launch.timeout`, instead of half an hour; one rank may load longer than the other."""
PHASES = ("load policy", "generate", "score", "reference", "optimise", "checkpoint")


@pytest.fixture(scope="module")
def pair(lab, wait_until):
    """8 steps on two ranks, paused after the fifth for longer than a collective may take."""
    run = lab.run("pair", *TWO, f"launch.timeout={PATIENCE}")
    run.hold(5)
    run.start()
    run.wait_at(5)
    run.beta = run.ctl("beta", "0.2", "--id", "to-0.2")
    run.ctl("pause")
    run.listening = listening(run)
    run.release(5)
    run.wait_for("paused")
    run.paused_at = run.step
    busy = {rank: cpu_seconds(p) for rank, p in run.ranks().items()}
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 2.5 * PATIENCE, "end of a long pause")
    run.loads = {
        rank: (cpu_seconds(p) - busy[rank]) / (time.monotonic() - began)
        for rank, p in run.ranks().items()
    }
    run.step_after_pause = run.step
    with run.client() as client:
        run.told = client.status().telemetry.ranks
    assert run.order("unpause")["status"] == "applied"
    run.finish()
    yield run
    run.end()


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


def listening(run):
    """Addresses at which a run's ranks and their agent wait for TCP connections."""
    found = []
    for process in processes_below(run.engine()):
        found += [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
    return found


def processes_below(process):
    return [process, *process.children(recursive=True)]


def test_two_ranks_give_the_numbers_of_one(pair, whole):
    for one, two in zip(whole.numbers()[:4], pair.numbers()[:4], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)


def test_a_pause_outlasts_the_time_a_collective_may_take(pair):
    assert pair.paused_at == pair.step_after_pause
    with pair.record() as record:
        assert len(record.attempts()) == 1


def test_paused_ranks_leave_the_processors_alone(pair):
    assert sorted(pair.loads) == [0, 1]
    assert max(pair.loads.values()) < 0.1  # a share of one core; it is a hundredth as a rule


def test_beta_changes_at_the_step_the_acknowledgement_says(pair):
    assert pair.beta.returncode == 0
    applied = pair.commands()["to-0.2"]["applied_step"]
    betas = pair.betas()
    assert betas[applied] == 0.2
    assert betas[applied - 1] != 0.2


def test_every_rank_tells_its_times_and_its_memory(pair):
    assert [load.rank for load in pair.told] == [0, 1]
    assert all(load.seconds["optimise"] > 0 and load.peak_memory > 1e8 for load in pair.told)


def test_nothing_of_a_run_on_one_machine_listens_to_others(pair):
    assert not {ip for ip in pair.listening if not ip.startswith("127.") and ip != "::1"}


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_to_the_same_end(lab, pair):
    run = lab.run("widow", *TWO)
    run.hold(5, 7)
    run.start()
    run.wait_at(5)
    assert run.ctl("beta", "0.2").returncode == 0
    run.release(5)
    run.wait_at(7)
    first = run.ranks()
    os.kill(first[1].pid, signal.SIGKILL)
    run.release(7)
    run.finish()
    (alert,) = [e for e in run.events("alert") if e["rule"] == "restart"]
    assert "rank 1" in alert["text"]
    assert "SIGKILL" in alert["text"]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in first.values())
    assert run.numbers() == pair.numbers()
    assert run.checkpoint(8)["hashes"] == pair.checkpoint(8)["hashes"]
    run.end()


@pytest.mark.parametrize(
    ("phase", "act"),
    [
        pytest.param(
            phase, act, marks=() if (phase, act) in {
                ("generate", "kill"), ("optimise", "raise"),
            } else pytest.mark.slow,
        )
        for phase in PHASES for act in ("raise", "kill", "hang")
    ],
)  # fmt: skip
def test_one_rank_that_fails_ends_all_and_is_named(lab, phase, act):
    # Of the two limits, the one that is the subject is short; loading takes as long as it takes.
    silence = "launch.load_silence=60" if phase.startswith("load") else "launch.silence=20"
    run = lab.run(
        f"fault-{phase.replace(' ', '-')}-{act}", *TWO, "launch.max_restarts=0",
        silence, "train.save_every=2",
    )  # fmt: skip
    path = f"{FAULTS}:{os.environ.get('PYTHONPATH', '')}"
    fault = {"PYTHONPATH": path, "RLHF_TUI_TEST_FAULT": f"{phase}|{act}"}
    process = lab.popen(*run.arguments, "--headless", env=lab.environment | fault)
    _, stderr = process.communicate(timeout=LONG)
    assert process.returncode == 1, stderr
    run.wait_gone()
    (error,) = run.events("error")
    assert "rank 1" in error["text"], error
    if act == "raise":
        assert "a fault made by a test" in error["text"]
        assert "phase_with_fault" in error["traceback"]
    elif act == "kill":
        assert "SIGKILL" in error["text"]
    else:
        assert "silent" in error["text"]
    assert run.state == "failed"


LAYOUTS = {"one": ("launch.processes=1",), "ddp": (*TWO, "parallel.strategy=ddp"),
           "fsdp": (*TWO, "parallel.strategy=fsdp")}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(lab):
    """8 steps, sharded over two ranks, with checkpoints of the fourth and the eighth."""
    run = lab.run("sharded", *LAYOUTS["fsdp"])
    run.start()
    run.finish()
    yield run
    run.end()


def continued(lab, run, name, layout):
    """A run forked off the checkpoint of step 4, on other ranks, to step 8."""
    other = lab.run(name)
    options = [word for key in LAYOUTS[layout] for word in ("-o", key)]
    done = lab.cli(
        "fork", run.name, "--from", 4, "--name", name, *options, "--headless", timeout=200
    )
    assert done.returncode == 0, done.stderr
    return other


def assert_same_to(numbers, others, bound):
    for one, two in zip(numbers[4:8], others[4:8], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=bound, abs=bound), (one["step"], name)


def test_a_sharded_run_goes_on_from_its_checkpoint_bit_for_bit(lab, sharded):
    again = continued(lab, sharded, "sharded-again", "fsdp")
    assert again.numbers()[4:8] == sharded.numbers()[4:8]
    assert again.checkpoint(8)["hashes"] == sharded.checkpoint(8)["hashes"]


@pytest.mark.parametrize("layout", ["one", "ddp"])
def test_what_two_ranks_saved_sharded_goes_on_otherwise_to_the_same_end(lab, sharded, layout):
    other = continued(lab, sharded, f"sharded-to-{layout}", layout)
    assert_same_to(sharded.numbers(), other.numbers(), 1e-4)


def test_what_one_rank_saved_goes_on_sharded_to_the_same_end(lab, whole):
    other = continued(lab, whole, "one-to-fsdp", "fsdp")
    assert_same_to(whole.numbers(), other.numbers(), 1e-4)
