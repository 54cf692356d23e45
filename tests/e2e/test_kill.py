"""kill -9, of the supervisor and of a rank, at any moment: nothing is lost, nobody is left."""

import os
import random
import signal
import time

import pytest

from tests.e2e.gate import DEADLY
from tests.e2e.lab import LONG, until

CRASH_IS_SEEN = 5.0
"""Seconds, the contract's."""
STEPS = 8


ORDERS = {
    3: {"to-0.2": ("beta", "0.2")},
    5: {
        "aim": ("kl", "adaptive", "--target", "2", "--horizon", "50"),
        "slower": ("set", "learning_rate=1e-4"),
    },
}
"""What the steered run was told, inside which step."""


def steer(run, until_step=STEPS, suffix=""):
    """Gives a run, held at those steps, the orders it has not carried out yet."""
    for step, orders in ORDERS.items():
        done = {i for i, c in run.commands().items() if c["status"] == "applied"}
        missing = {i: words for i, words in orders.items() if i not in done}
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
def crashed(lab, wait_until):
    """A steered run whose supervisor is killed inside step 7, after everything was set."""
    run = lab.run("crashed")
    run.hold(*ORDERS, 7)
    run.start()
    steer(run)
    run.wait_at(7)
    run.engine().kill()
    run.seen = wait_until(lambda: state_in_ls(run) == "crashed", "crashed in ls", CRASH_IS_SEEN)
    run.wait_gone()
    yield run
    run.end()


def test_a_killed_supervisor_is_seen_as_crashed_and_leaves_no_process(crashed, processes_of):
    assert crashed.seen
    assert not processes_of(crashed.session.folder)


def test_a_crashed_session_can_be_read_and_says_how_to_go_on(crashed):
    done = crashed.lab.cli("status", crashed.name)
    assert done.returncode == 0
    assert f"rlhf-tui resume {crashed.name}" in done.stdout
    assert [row["step"] for row in crashed.lab.json("metrics", crashed.name)] == list(range(1, 7))


def test_a_crashed_session_cannot_be_steered(crashed):
    done = crashed.ctl("pause")
    assert done.returncode == 3
    assert f"rlhf-tui resume {crashed.name}" in done.stderr


def test_resumed_it_ends_where_the_undisturbed_one_ends_settings_included(crashed, steered):
    if crashed.state == "crashed":
        crashed.release(7)
        crashed.resume(mode="--headless")
    assert crashed.numbers() == steered.numbers()[:8]
    assert crashed.checkpoint(8)["hashes"] == steered.checkpoint(8)["hashes"]
    mine, theirs = (r.checkpoint(8)["state"]["settings"] for r in (crashed, steered))
    assert mine == theirs


def kill_and_resume(run, rng):
    """Kills the supervisor at a random moment inside or after a random step, and resumes."""
    step = rng.randint(1, STEPS - 1)
    run.hold(*ORDERS, step)
    run.start()
    steer(run, step)
    run.wait_at(step)
    if rng.random() < 0.8:  # else it dies while the rank is held
        run.release(step)
    # Somewhere: generating, scoring, optimising, saving, or between two of these.
    time.sleep(rng.uniform(0, 0.5))
    if run.session.is_live():
        run.engine().kill()
    run.wait_gone()
    # A dying process loses its command line before its lock.
    until(lambda: run.state in ("finished", "crashed"), "end that is seen", CRASH_IS_SEEN)
    if run.state == "finished":  # it was faster
        return
    run.release(step, *ORDERS)
    done = {i for i, c in run.commands().items() if c["status"] == "applied"}
    run.hold(*(s for s, orders in ORDERS.items() if not done.issuperset(orders)))
    run.resume()
    steer(run, suffix="-again")
    run.finish()


def test_a_killed_foreground_run_takes_its_rank_along(lab):
    run = lab.run("orphan")
    run.hold(1)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(1)
    process.kill()
    process.communicate()
    run.wait_gone()
    assert run.state == "crashed"


@pytest.fixture(scope="module")
def bereft(lab, wait_until):
    """A steered run whose rank is killed inside step 7 with a pause on its way."""
    run = lab.run("bereft")
    run.hold(*ORDERS, 7)
    run.start()
    steer(run)
    run.wait_at(7)
    run.wait_saved(4)
    first = run.rank()
    assert run.ctl("pause", "--id", "survivor").returncode == 0
    run.release(7)
    run.hold(7)
    os.kill(first.pid, signal.SIGKILL)
    # Restarted at the checkpoint of step 4, it meets the pause at once.
    run.wait_for("paused")
    run.paused_at = run.step
    run.second_pid = run.rank().pid != first.pid
    run.release(7)
    assert run.order("unpause")["status"] == "applied"
    run.finish()
    yield run
    run.end()


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(bereft):
    assert bereft.second_pid
    with bereft.record() as record:
        assert [a.from_step for a in record.attempts()] == [0, 4]


def test_the_restart_and_its_reason_are_in_the_ledger(bereft):
    (alert,) = [e for e in bereft.events("alert") if e["rule"] == "restart"]
    assert "SIGKILL" in alert["text"]
    assert any("SIGKILL" in e["text"] for e in bereft.events("error"))


def test_a_command_that_was_on_its_way_is_carried_out_after_the_restart(bereft):
    assert bereft.paused_at == 4
    assert bereft.commands()["survivor"]["applied_step"] == 5


def test_a_run_whose_rank_was_killed_ends_where_the_undisturbed_one_ends(bereft, steered):
    assert bereft.numbers() == steered.numbers()[:8]
    assert bereft.checkpoint(8)["hashes"] == steered.checkpoint(8)["hashes"]


@pytest.fixture(scope="module")
def poisoned(lab, wait_until):
    """A run that was given, inside step 3, a probe that no rank survives, and another beta."""
    run = lab.run("poisoned")
    run.hold(3)
    try:
        run.start()
        run.wait_at(3)
        asker = lab.popen("ctl", run.name, "probe", DEADLY, "--id", "poison")
        wait_until(lambda: "poison" in run.commands(), "the probe")
        assert run.ctl("beta", "0.2", "--id", "behind").returncode == 0
        run.release(3)
        _, run.told = asker.communicate(timeout=LONG)
        run.finish()
        yield run
    finally:
        run.end()


def test_an_order_with_which_the_ranks_fail_twice_is_given_up(poisoned):
    given_up = poisoned.commands()["poison"]
    assert given_up["status"] == "rejected"
    assert given_up["reason"] == "the ranks failed 2 times while it was pending"
    assert given_up["reason"] in poisoned.told
    with poisoned.record() as record:
        assert len(record.attempts()) == 3


def test_what_was_ordered_beside_it_is_carried_out(poisoned):
    behind = poisoned.commands()["behind"]
    assert behind["status"] == "applied"
    assert poisoned.betas()[behind["applied_step"]] == 0.2


def test_without_restarts_left_a_killed_rank_is_a_failed_run(lab):
    run = lab.run("no-second-chance", "launch.max_restarts=0")
    run.hold(2)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(2)
    os.kill(run.rank().pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert run.state == "failed"


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 2, 3, 4, 5, 6))]
)
def test_killed_at_a_random_moment_it_ends_where_the_undisturbed_one_ends(lab, steered, seed):
    run = lab.run(f"random-{seed}")
    try:
        kill_and_resume(run, random.Random(seed))  # noqa: S311 - repeatable on purpose
        assert run.numbers() == steered.numbers()[:8]
    finally:
        run.end()
