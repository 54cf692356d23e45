"""kill -9 of the supervisor or a rank at any moment loses no data and leaves no process."""

import os
import random
import signal
import time

import pytest

from tests.e2e.gate import DEADLY
from tests.e2e.lab import processes
from tests.waiting import LONG, until

CRASH_TIMEOUT = 5.0
"""Seconds in which a crash must become visible."""
STEPS = 8


COMMANDS = {
    3: {"to-0.2": ("beta", "0.2")},
    5: {
        "aim": ("kl", "adaptive", "--target", "2", "--horizon", "50"),
        "slower": ("set", "learning_rate=1e-4"),
    },
}
"""The commands of the run `steered`, by the step in which they are sent, with their ids."""


def steer(run, until_step=STEPS, suffix=""):
    """Sends the commands that a run, held at their steps, has not applied yet."""
    for step, commands in COMMANDS.items():
        done = {i for i, c in run.commands().items() if c["status"] == "applied"}
        missing = {i: words for i, words in commands.items() if i not in done}
        if not missing or step > until_step:
            continue
        run.wait_at(step)
        for command_id, words in missing.items():
            assert run.ctl(*words, "--id", command_id + suffix).returncode == 0
        if step < until_step:
            run.release(step)


def state_in_ls(run):
    return next(row["state"] for row in run.lab.json("ls") if row["name"] == run.name)


@pytest.fixture(scope="module")
def crashed(make_lab):
    """A run like `steered` in a very deep folder, whose processes are killed inside step 7.

    First its rank, while a pause is pending: it starts again from the checkpoint of step 4. When it
    is inside step 7 again, its supervisor.
    """
    deep = "/".join(["deep", *("a-folder-with-a-long-name" for _ in range(8))])
    run = make_lab(deep).run("crashed")
    run.hold(*COMMANDS, 7)
    run.start()
    steer(run)
    run.wait_at(7)
    run.wait_saved(4)
    run.socket = run.session.folder / "engine.sock"
    run.had_socket = run.socket.is_socket()
    first = run.rank()
    assert run.ctl("pause", "--id", "survivor").returncode == 0
    run.hold(7)
    os.kill(first.pid, signal.SIGKILL)
    # After the restart from the checkpoint of step 4 the pause is applied at once.
    run.wait_for("paused")
    run.paused_at = run.step
    run.second_pid = run.rank().pid != first.pid
    assert run.command("unpause")["status"] == "applied"
    run.wait_at(7)
    run.engine().kill()
    run.seen = until(lambda: state_in_ls(run) == "crashed", "crashed in ls", CRASH_TIMEOUT)
    run.wait_gone()
    run.left = [" ".join(p.cmdline()) for p in processes(run.session.folder)]
    run.left_socket = run.socket.is_socket()
    run.status = run.lab.cli("status", run.name)
    run.steps = [row["step"] for row in run.lab.json("metrics", run.name)]
    run.steering = run.ctl("pause")
    yield run
    run.end()


@pytest.fixture(scope="module")
def resumed(crashed):
    """The crashed run after a resume to its end."""
    crashed.release(7)
    crashed.resume(mode="--headless")
    return crashed


def test_a_killed_supervisor_is_shown_as_crashed_and_leaves_no_process(crashed):
    assert crashed.seen
    assert not crashed.left


def test_a_crashed_session_can_be_read_and_says_how_to_resume(crashed):
    assert crashed.status.returncode == 0
    assert f"rlhf-tui resume {crashed.name}" in crashed.status.stdout
    assert crashed.steps == list(range(1, 7))


def test_a_crashed_session_cannot_be_steered(crashed):
    assert crashed.steering.returncode == 3
    assert f"rlhf-tui resume {crashed.name}" in crashed.steering.stderr


def test_a_killed_rank_is_restarted_from_the_last_checkpoint(crashed):
    assert crashed.second_pid
    with crashed.reader() as reader:
        assert [a.from_step for a in reader.attempts()][:2] == [0, 4]


def test_the_restart_and_its_reason_are_events(crashed):
    (alert,) = [e for e in crashed.events("alert") if e["rule"] == "restart"]
    assert "SIGKILL" in alert["text"]
    assert any("SIGKILL" in e["text"] for e in crashed.events("error"))


def test_a_pending_command_is_applied_after_the_restart(crashed):
    assert crashed.paused_at == 4
    assert crashed.commands()["survivor"]["applied_step"] == 5


def test_resumed_it_ends_like_the_uninterrupted_run_settings_included(resumed, steered):
    assert [row["step"] for row in resumed.numbers()] == list(range(1, 9))
    assert resumed.numbers() == steered.numbers()[:8]
    ours, expected = (r.checkpoint(8)["state"]["settings"] for r in (resumed, steered))
    assert ours == expected


def test_the_weights_and_the_optimiser_are_the_same_bit_for_bit(resumed, steered):
    assert resumed.checkpoint(8)["hashes"] == steered.checkpoint(8)["hashes"]


def test_the_samples_are_the_same_each_once(resumed, steered):
    def texts(run):
        with run.reader() as reader:
            return [(s.step, s.index, s.response, s.score) for s in reader.samples.newest()]

    assert texts(resumed) == [text for text in texts(steered) if text[0] <= STEPS]


def test_what_was_trained_after_the_checkpoint_is_on_abandoned_branches(resumed):
    with resumed.reader() as reader:
        assert [a.from_step for a in reader.attempts()] == [0, 4, 4]
        past = {(attempt, step) for attempt, step, _ in reader.metrics.past_series("lr")}
    assert past == {(1, 5), (1, 6), (2, 5), (2, 6)}


@pytest.mark.parametrize(
    "name", ["objective/scores", "objective/kl", "objective/kl_coef", "grad_norm", "lr"]
)
def test_a_restarted_rank_repeats_the_numbers_of_the_uninterrupted_run(resumed, steered, name):
    with resumed.reader() as reader, steered.reader() as other:
        past, expected = reader.metrics.past_series(name), dict(other.metrics.series(name))
    assert {step: value for attempt, step, value in past if attempt == 2} == {
        step: expected[step] for step in (5, 6)
    }


def test_a_socket_path_longer_than_an_address_works(crashed):
    assert len(str(crashed.socket)) > 108
    assert crashed.had_socket


def test_a_socket_left_by_a_killed_engine_is_no_obstacle(resumed):
    assert resumed.left_socket
    assert resumed.state == "finished"


def kill_and_resume(run, rng):
    """Kills the supervisor at a random moment inside or after a random step, and resumes."""
    step = rng.randint(1, STEPS - 1)
    run.hold(*COMMANDS, step)
    run.start()
    steer(run, step)
    run.wait_at(step)
    if rng.random() < 0.8:  # otherwise the supervisor is killed while the rank is held
        run.release(step)
    # A random moment of generation, scoring, optimisation or saving.
    time.sleep(rng.uniform(0, 0.5))
    if run.session.is_live():
        run.engine().kill()
    run.wait_gone()
    # The kernel clears the command line of a process before it releases its lock.
    until(lambda: run.state in ("finished", "crashed"), "final state", CRASH_TIMEOUT)
    if run.state == "finished":  # before it was killed
        return
    run.release(step, *COMMANDS)
    done = {i for i, c in run.commands().items() if c["status"] == "applied"}
    run.hold(*(s for s, commands in COMMANDS.items() if not done.issuperset(commands)))
    run.resume()
    steer(run, suffix="-again")
    run.finish()


@pytest.mark.slow
def test_the_rank_of_a_killed_foreground_run_ends_too(lab):
    run = lab.run("orphan")
    run.hold(1)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(1)
    process.kill()
    process.communicate()
    run.wait_gone()
    assert run.state == "crashed"


@pytest.fixture(scope="module")
def poisoned(lab):
    """A run that gets, inside step 3, a probe that kills every rank, and then a new beta."""
    run = lab.run("poisoned")
    run.hold(3)
    try:
        run.start()
        run.wait_at(3)
        prober = lab.popen("ctl", run.name, "probe", DEADLY, "--id", "poison")
        until(lambda: "poison" in run.commands(), "the probe")
        assert run.ctl("beta", "0.2", "--id", "behind").returncode == 0
        run.release(3)
        _, run.probe_stderr = prober.communicate(timeout=LONG)
        run.finish()
        yield run
    finally:
        run.end()


@pytest.mark.slow
def test_a_command_that_kills_the_ranks_twice_is_rejected(poisoned):
    probe = poisoned.commands()["poison"]
    assert probe["status"] == "rejected"
    assert probe["reason"] == "the ranks failed 2 times while it was pending"
    assert probe["reason"] in poisoned.probe_stderr
    with poisoned.reader() as reader:
        assert len(reader.attempts()) == 3


@pytest.mark.slow
def test_the_other_command_is_applied(poisoned):
    behind = poisoned.commands()["behind"]
    assert behind["status"] == "applied"
    assert poisoned.betas()[behind["applied_step"]] == 0.2


@pytest.mark.slow
def test_without_restarts_left_a_killed_rank_fails_the_run(lab):
    run = lab.run("no-second-chance", "launch.max_restarts=0")
    run.hold(2)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(2)
    os.kill(run.rank().pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "SIGKILL" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert run.state == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7))
def test_killed_at_a_random_moment_it_ends_like_the_uninterrupted_run(lab, steered, seed):
    run = lab.run(f"random-{seed}")
    try:
        kill_and_resume(run, random.Random(seed))  # noqa: S311 - reproducible
        assert run.numbers() == steered.numbers()[:8]
    finally:
        run.end()
