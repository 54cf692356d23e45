"""Signals to a foreground run, as sent by a batch scheduler."""

import os
import signal

import pytest


@pytest.fixture(scope="module")
def signalled(either_lab):
    """A run that is stopped by a signal inside steps 2, 4 and 6, and resumed in between.

    Before the last signal its stdout is closed and SIGHUP is sent.
    """
    lab = either_lab
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
        # Like a scheduler, to the whole process group.
        os.killpg(process.pid, number)
        run.wait_for("stopping")
        run.wait_sent()  # or the step may end before the rank knows of the stop
        run.alive[number] = process.poll() is None
        run.release(step)
        run.endings[number] = (process.wait(timeout=120), process.stderr.read())
        process.stderr.close()
        run.wait_gone()
        run.steps[number] = (run.step, run.state)
    yield run
    run.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_ends_the_run_without_an_error(signalled, number):
    code, stderr = signalled.endings[number]
    assert code == 0, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 4), (signal.SIGUSR1, 6)]
)
def test_the_current_step_is_finished_and_saved(signalled, number, step):
    assert signalled.alive[number]
    assert signalled.steps[number] == (step, "stopped")
    assert signalled.checkpoint(step)["state"]["step"] == step


def test_a_hangup_and_a_closed_stdout_do_not_end_it(signalled):
    # Both happen inside step 6; the run finishes this step because of SIGUSR1.
    assert signalled.steps[signal.SIGUSR1][0] == 6


def test_the_command_log_names_the_signals(signalled):
    stops = [c["who"] for c in signalled.commands().values() if c["command"] == "stop"]
    assert stops == ["SIGTERM", "SIGINT", "SIGUSR1"]


def test_stopped_three_times_it_has_the_numbers_of_the_uninterrupted_run(signalled, undisturbed):
    assert signalled.numbers() == undisturbed.numbers()[:6]


def test_without_a_terminal_stdout_is_one_line_per_step_without_escape_codes(whole):
    lines = [line for line in whole.printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{i}/8" for i in range(1, 9)]
    assert "\x1b" not in whole.printed
    assert "\r" not in whole.printed


def test_stop_now_ends_at_once_without_saving(either_lab):
    lab = either_lab
    run = lab.run("at-once")
    run.hold(2)
    process = lab.popen(*run.arguments, "--headless")
    run.wait_at(2)
    assert run.ctl("checkpoint", "--id", "too-late").returncode == 0
    waiting = lab.popen("ctl", run.name, "pause", "--wait")
    # The pause is in the journal, so the client is waiting for the result now.
    run.wait_for("pausing")
    assert run.ctl("stop", "--now").returncode == 0
    process.communicate(timeout=240)
    assert process.returncode == 0
    run.wait_gone()
    assert run.state == "stopped"
    assert not list(run.session.checkpoints.iterdir())
    # Pending commands are rejected, and the waiting client gets the result.
    assert run.commands()["too-late"]["status"] == "rejected"
    _, stderr = waiting.communicate(timeout=240)
    assert waiting.returncode == 1
    assert "before it was carried out" in stderr


@pytest.mark.slow
def test_a_rank_that_dies_while_stopping_fails_the_run(lab):
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
