"""A run over two simulated machines (two agents on one machine), one of which fails and rejoins."""

import os
import signal
import socket
import subprocess

import psutil
import pytest

from tests.variants import some_of
from tests.waiting import until


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def agents_below(process):
    """The torchrun agents among the descendants of a process."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    return [p for p in descendants if "engine.train.torchrun.agent" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def machines(lab):
    """A steered run over two machines; the agent of one is killed and the machine rejoins."""
    address = f"127.0.0.1:{free_port()}"
    run = lab.run(
        "machines", "launch.nodes=2", "launch.processes=1", f"launch.rendezvous={address}"
    )
    run.hold(3, 7)
    first = lab.popen(*run.arguments, "--headless")
    until(lambda: run.events("alert"), "alert that asks for another machine")
    run.join_alert = run.events("alert")[0]["text"]
    secret = run.session.secret_file
    run.secret_mode = secret.stat().st_mode & 0o777
    joiner = lab.popen(
        "join", address, "--wait", 120, "--secret-file", secret, stderr=subprocess.STDOUT
    )
    run.wait_at(3)
    run.beta = run.ctl("beta", "0.2")
    run.pause = run.ctl("pause")
    run.release(3)
    run.wait_for("paused")
    run.paused_at = run.step
    assert run.command("unpause")["status"] == "applied"
    run.wait_at(7)
    run.wait_saved(4)
    (agent,) = agents_below(joiner)
    os.kill(agent.pid, signal.SIGKILL)
    run.release(7)
    run.finish()
    run.printed, run.warned = first.communicate(timeout=240)
    run.join_output, _ = joiner.communicate(timeout=240)
    run.join_code = joiner.returncode
    yield run
    joiner.kill()
    run.end()


@pytest.mark.slow
def test_the_run_says_how_another_machine_joins(machines):
    assert "rlhf-tui join 127.0.0.1:" in machines.join_alert


@pytest.mark.slow
def test_a_run_over_two_machines_is_steered_as_one(machines):
    commands = machines.commands()
    assert {c["status"] for c in commands.values()} == {"applied"}
    (beta,) = [c for c in commands.values() if c["command"] == "beta"]
    assert machines.betas()[beta["applied_step"]] == 0.2
    assert machines.paused_at == 3


@pytest.mark.slow
def test_a_lost_machine_is_reported_and_the_run_continues_when_it_rejoins(machines):
    (alert,) = [e for e in machines.events("alert") if e["rule"] == "restart"]
    assert "another machine" in alert["text"]
    assert "rlhf-tui join" in alert["text"]
    with machines.reader() as reader:
        assert [a.from_step for a in reader.attempts()] == [0, 4]


@pytest.mark.slow
def test_two_machines_compute_the_numbers_of_one(machines, whole):
    for one, two in zip(whole.numbers()[:3], machines.numbers()[:3], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)


@pytest.mark.slow
def test_join_reports_its_progress_and_ends_with_the_run(machines):
    assert machines.join_code == 0
    assert machines.join_output.count("joining machines") == 2
    assert "the run is over" in machines.join_output


def test_an_invalid_address_is_one_line(lab):
    done = lab.cli("join", "nowhere")
    assert done.returncode == 2
    assert "HOST:PORT" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_several_machines_need_a_rendezvous_address(lab):
    run = lab.run("nowhere", "launch.nodes=2")
    done = lab.cli(*run.arguments, "--headless")
    assert done.returncode == 2
    assert "launch.rendezvous" in done.stderr
    assert not run.session.folder.exists()


PORTS = {
    "ranks": ("launch.rendezvous", ["launch.nodes=2"]),
    "engines": ("rollout.rendezvous", ["rollout.engine=vllm", "rollout.joined=1"]),
}


# tests/train/test_rendezvous.py has the error of the ranks' port every time.
@pytest.mark.parametrize("port", some_of(PORTS, "engines"))
def test_a_port_in_use_is_one_line_and_leaves_nothing(lab, port):
    key, others = port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = lab.run(f"taken-{key}", *others, f"{key}={address}")
        done = lab.cli(*run.arguments, "--headless")
    assert done.returncode == 2
    assert f"{key}: cannot listen" in done.stderr.splitlines()[-1]
    assert not run.session.folder.exists()


@pytest.mark.slow
def test_an_elastic_run_takes_a_machine_at_a_checkpoint_and_continues_without_it(lab):
    address = f"127.0.0.1:{free_port()}"
    run = lab.run(
        "elastic", "launch.nodes=2", "launch.min_nodes=1", "launch.join_wait=8",
        "launch.processes=1", "train.save_every=2", f"launch.rendezvous={address}",
    )  # fmt: skip
    run.hold(1, 5)
    first = lab.popen(*run.arguments, "--headless")
    run.wait_at(1)  # alone
    joiner = lab.popen(
        "join", address, "--secret-file", run.session.secret_file, stderr=subprocess.STDOUT
    )
    until(lambda: "waiting for its next start" in joiner.stdout.readline(), "late machine")
    run.release(1)
    run.wait_at(5)
    run.wait_saved(4)
    for process in psutil.Process(joiner.pid).children(recursive=True):
        process.kill()
    joiner.kill()
    run.release(5)
    first.communicate(timeout=240)
    run.finish()
    with run.reader() as reader:
        starts = [a.from_step for a in reader.attempts()]
    ranks = [e["ranks"] for e in run.events("ready")]
    assert (starts, ranks) == ([0, 2, 4], [1, 2, 1])
