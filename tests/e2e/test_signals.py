"""A foreground run under a batch scheduler: what ends it, what does not, and in what state."""

import os
import signal

import pytest


@pytest.fixture(scope="module")
def signalled(lab):
    """One run, ended by each stop signal in turn inside steps 2, 4 and 6, and resumed between.

    The last time its stdout is closed and a SIGHUP is sent on the way.
    """
    run = lab.run("signalled")
    run.endings, run.steps, run.alive = {}, {}, {}
    starts = [run.arguments, *[["resume", run.name]] * 2]
    stops = [(signal.SIGTERM, 2), (signal.SIGINT, 4), (signal.SIGUSR1, 6)]
    for arguments, (number, step) in zip(starts, stops, strict=True):
        run.hold(step)
        process = lab.popen(*arguments, "--headless", start_new_session=True)
        if number == signal.SIGUSR1:
            process.stdout.close()
            run.wait_at(step)
            process.send_signal(signal.SIGHUP)
        run.wait_at(step)
        # As a scheduler does it: to everyone in the group.
        os.killpg(process.pid, number)
        run.wait_for("stopping")
        run.alive[number] = process.poll() is None
        run.release(step)
        run.endings[number] = (process.wait(timeout=120), process.stderr.read())
        process.stderr.close()
        run.wait_gone()
        run.steps[number] = (run.step, run.state)
    yield run
    run.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_ends_the_run_well(signalled, number):
    code, stderr = signalled.endings[number]
    assert code == 0, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 4), (signal.SIGUSR1, 6)]
)
def test_the_step_in_hand_is_finished_and_saved(signalled, number, step):
    assert signalled.alive[number]
    assert signalled.steps[number] == (step, "stopped")
    assert signalled.checkpoint(step)["state"]["step"] == step


def test_a_hangup_and_a_closed_stdout_do_not_end_it(signalled):
    # It was sent both inside step 6, finished that step, and only then obeyed SIGUSR1.
    assert signalled.steps[signal.SIGUSR1][0] == 6


def test_the_ledger_names_the_signals(signalled):
    stops = [c["who"] for c in signalled.commands().values() if c["command"] == "stop"]
    assert stops == ["SIGTERM", "SIGINT", "SIGUSR1"]


def test_stopped_three_times_it_has_the_numbers_of_the_undisturbed_run(signalled, whole):
    assert signalled.numbers() == whole.numbers()[:6]


def test_one_line_a_step_and_no_escape_codes_where_stdout_is_no_terminal(whole):
    lines = [line for line in whole.printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{i}/8" for i in range(1, 9)]
    assert "\x1b" not in whole.printed
    assert "\r" not in whole.printed


def test_stop_now_ends_at_once_without_saving(lab):
    run = lab.run("at-once")
    run.hold(2)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(2)
    assert run.ctl("checkpoint", "--id", "too-late").returncode == 0
    waiting = lab.popen("ctl", run.name, "pause", "--wait")
    # Its pause is in the journal, so it is waiting for an answer now.
    run.wait_for("pausing")
    assert run.ctl("stop", "--now").returncode == 0
    process.communicate(timeout=240)
    assert process.returncode == 0
    run.wait_gone()
    assert run.state == "stopped"
    assert not list(run.session.checkpoints.iterdir())
    # What could not be carried out any more is not left open, and who waited is told.
    assert run.commands()["too-late"]["status"] == "rejected"
    _, stderr = waiting.communicate(timeout=240)
    assert waiting.returncode == 1
    assert "before it was carried out" in stderr


def test_a_rank_that_dies_while_stopping_is_not_taken_for_a_stop_at_once(lab):
    run = lab.run("died-stopping", "launch.max_restarts=0")
    run.hold(2)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(2)
    process.send_signal(signal.SIGTERM)
    run.wait_for("stopping")
    os.kill(run.rank().pid, signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode == 1
    assert run.state == "failed"
