"""Runs of two ranks: commands, long pauses, failures of one rank, and checkpoints."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.waiting import LONG, until

TWO = ("launch.processes=2", "launch.threads=1")
FAULTS = Path(__file__).with_name("faults")
TIMEOUT = 10.0
"""`launch.timeout` in seconds; must exceed the difference in loading time between the ranks."""
SILENCE = 20.0
"""`launch.silence` in seconds; the long pause is longer."""
PHASES = ("load policy", "generate", "score", "reference", "optimise", "checkpoint")


@pytest.fixture(scope="module")
def pair(lab, tmp_path_factory):
    """8 steps on two ranks, with a pause after the fifth that is longer than both time-outs.

    The reward function returns NaN in step 6 and raises in step 7, until the run has paused for it.
    Inside step 9 one of the ranks is killed.
    """
    limits = (f"launch.timeout={TIMEOUT}", f"launch.silence={SILENCE}", "launch.max_restarts=0")
    run = lab.run("pair", *TWO, *limits, "reward.retries=1", steps=9)
    run.hold(5, 9)
    run.score_at(6, "nan")
    run.score_at(7, "raise no service")
    run.temporary = tmp_path_factory.mktemp("temporary")
    lab.environment["TMPDIR"] = str(run.temporary)
    run.start()
    del lab.environment["TMPDIR"]
    run.wait_at(5)
    run.beta = run.ctl("beta", "0.2", "--id", "to-0.2")
    run.ctl("pause")
    run.listening = listening_addresses(run)
    run.release(5)
    run.wait_for("paused")
    run.paused_at = run.step
    busy = {rank: cpu_seconds(p) for rank, p in run.ranks().items()}
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 2.5 * TIMEOUT, "end of a long pause")
    run.loads = {
        rank: (cpu_seconds(p) - busy[rank]) / (time.monotonic() - began)
        for rank, p in run.ranks().items()
    }
    run.step_after_pause = run.step
    with run.client() as client:
        run.rank_loads = client.status().telemetry.ranks
    assert run.command("unpause")["status"] == "applied"
    run.wait_for("paused")
    run.with_nan = lab.json("status", run.name)
    run.score_at(6, "")
    assert run.command("unpause")["status"] == "applied"
    run.wait_for("paused")
    run.without_reward = lab.json("status", run.name)
    run.score_at(7, "")
    assert run.command("unpause")["status"] == "applied"
    run.wait_at(9)
    run.wait_saved(8)
    os.kill(run.ranks()[1].pid, signal.SIGKILL)  # the other one is in Python code and goes on
    run.wait_for("failed")
    run.wait_gone()
    yield run
    run.end()


def cpu_seconds(process):
    times = process.cpu_times()
    return times.user + times.system


def listening_addresses(run):
    """The addresses on which the processes of a run listen for TCP connections."""
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


def test_a_pause_may_be_longer_than_the_timeouts_of_collectives_and_of_silence(pair):
    assert pair.paused_at == pair.step_after_pause
    with pair.reader() as reader:
        assert len(reader.attempts()) == 1, "nothing was restarted"


def test_a_reward_that_raises_pauses_all_ranks_until_it_can_be_called(pair):
    status = pair.without_reward
    assert status["step"] == 6
    assert status["pause_reason"].startswith(
        "reward 'score' at step 7: ValueError: no service at gate.py:"
    )
    _, alert = [e for e in pair.events("alert") if e["rule"] == "reward"]
    assert alert["text"] == status["pause_reason"]
    assert "in score" in alert["traceback"]
    log = pair.session.log_file.read_text()
    assert "called again in 1 s" in log
    assert log.count("Traceback") == 1, "it is logged once, not by each rank"


def test_a_score_that_cannot_be_used_pauses_all_ranks_until_it_can(pair):
    status = pair.with_nan
    assert status["step"] == 5
    assert status["pause_reason"].startswith("reward 'score' returned nan for response 0 of step 6")


def test_paused_ranks_use_almost_no_processor_time(pair):
    assert sorted(pair.loads) == [0, 1]
    assert max(pair.loads.values()) < 0.1  # share of one core; usually about 0.01


def test_beta_changes_at_the_step_the_acknowledgement_says(pair):
    assert pair.beta.returncode == 0
    applied = pair.commands()["to-0.2"]["applied_step"]
    betas = pair.betas()
    assert betas[applied] == 0.2
    assert betas[applied - 1] != 0.2


def test_every_rank_reports_its_times_and_memory(pair):
    assert [load.rank for load in pair.rank_loads] == [0, 1]
    assert all(load.seconds["optimise"] > 0 and load.peak_memory > 1e8 for load in pair.rank_loads)


def test_one_rank_that_is_killed_ends_all_and_is_named(pair):
    (error,) = pair.events("error")
    assert "rank 1" in error["text"]
    assert "SIGKILL" in error["text"]
    assert pair.step == 8


def test_a_run_leaves_nothing_in_the_temporary_folder(pair):
    # torch 2.15 makes the folder of its compiler, which all programs of the user share.
    left = [path.name for path in pair.temporary.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []


def test_a_run_on_one_machine_listens_on_loopback_only(pair):
    assert not {ip for ip in pair.listening if not ip.startswith("127.") and ip != "::1"}


@pytest.mark.slow
def test_after_a_killed_rank_all_restart_and_the_run_ends_with_the_same_numbers(lab, pair):
    run = lab.run("killed-rank", *TWO)
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


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("act", ["raise", "kill", "hang"])
def test_one_rank_that_fails_ends_all_and_is_named(lab, phase, act):
    # Only the limit under test is short; the loading time depends on the machine.
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


@pytest.mark.slow
def test_two_ranks_out_of_memory_repeat_the_step_with_a_halved_micro_batch(lab, tmp_path, whole):
    run = lab.run("memory", *TWO, "launch.max_restarts=0", "train.save_every=1", steps=3)
    path = f"{FAULTS}:{os.environ.get('PYTHONPATH', '')}"
    fault = {"PYTHONPATH": path, "RLHF_TUI_TEST_FAULT": f"optimise|memory:{tmp_path / 'once'}"}
    process = lab.popen(*run.arguments, "--headless", env=lab.environment | fault)
    _, stderr = process.communicate(timeout=LONG)
    assert process.returncode == 0, stderr
    (change,) = run.commands().values()
    assert (change["command"], change["applied_step"]) == ("set", 2)
    (alert,) = [e["text"] for e in run.events("alert") if e["rule"] == "memory"]
    assert alert.startswith("rank 1: step 2 ran out of memory in the phase 'optimise': CUDA out")
    assert "from step 2 with micro_batch_size" in alert
    for one, two in zip(whole.numbers()[:3], run.numbers(), strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)


LAYOUTS = {"one": ("launch.processes=1",), "ddp": (*TWO, "parallel.strategy=ddp"),
           "fsdp": (*TWO, "parallel.strategy=fsdp")}  # fmt: skip


DEMO = (
    "rollout.batch_size=64", "rollout.max_new_tokens=32", "ppo.epochs=2", "ppo.minibatches=2",
    "ppo.micro_batch_size=32",
)  # fmt: skip
"""The demo's own sizes: some 750 tokens a step."""


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "null"])
def test_one_rank_ddp_and_fsdp_give_the_same_steps_of_the_demo(lab, threads):
    runs = {}
    for layout, options in LAYOUTS.items():
        name = f"demo-{layout}-{threads}"
        run = lab.run(name, *DEMO, *options, f"launch.threads={threads}", steps=4)
        run.start()
        run.finish()
        runs[layout] = run.numbers()
    for layout in ("ddp", "fsdp"):
        for one, two in zip(runs["one"], runs[layout], strict=True):
            for name, value in one.items():
                assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (layout, name)


@pytest.mark.slow
def test_two_ranks_draw_the_same_prompts_again_as_one(lab):
    dynamic = ("rollout.per_prompt=2", "rollout.dynamic=true", "rollout.dynamic_range=[0, 9]",
               "rollout.dynamic_limit=3")  # fmt: skip
    runs = []
    for layout in ("one", "ddp"):
        run = lab.run(f"drawn-again-{layout}", *dynamic, *LAYOUTS[layout], steps=3)
        run.start()
        run.finish()
        runs.append(run.numbers())
    assert all(row["val/redrawn_prompts"] for row in runs[0])
    for one, two in zip(*runs, strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)


@pytest.fixture(scope="module")
def sharded(lab):
    """8 steps, sharded over two ranks, with checkpoints at steps 4 and 8."""
    run = lab.run("sharded", *LAYOUTS["fsdp"])
    run.start()
    run.finish()
    yield run
    run.end()


def fork_with_layout(lab, run, name, layout):
    """Forks a run at step 4 with another layout and trains to step 8."""
    other = lab.run(name)
    options = [word for key in LAYOUTS[layout] for word in ("-o", key)]
    done = lab.cli(
        "fork", run.name, "--from", 4, "--name", name, *options, "--headless", timeout=200
    )
    assert done.returncode == 0, done.stderr
    return other


def assert_close(numbers, others, bound):
    for one, two in zip(numbers[4:8], others[4:8], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=bound, abs=bound), (one["step"], name)


@pytest.mark.slow
def test_a_sharded_run_resumes_from_its_checkpoint_bit_for_bit(lab, sharded):
    again = fork_with_layout(lab, sharded, "sharded-again", "fsdp")
    assert again.numbers()[4:8] == sharded.numbers()[4:8]
    assert again.checkpoint(8)["hashes"] == sharded.checkpoint(8)["hashes"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "ddp"])
def test_a_sharded_checkpoint_resumes_in_another_layout_with_the_same_numbers(lab, sharded, layout):
    other = fork_with_layout(lab, sharded, f"sharded-to-{layout}", layout)
    assert_close(sharded.numbers(), other.numbers(), 1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_resumes_sharded_with_the_same_numbers(lab, whole):
    other = fork_with_layout(lab, whole, "one-to-fsdp", "fsdp")
    assert_close(whole.numbers(), other.numbers(), 1e-4)
