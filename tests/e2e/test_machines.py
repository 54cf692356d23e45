"""Two torchrun agents on one machine, as two machines: run, steered, one lost, found again."""

import os
import signal
import socket
import subprocess

import psutil
import pytest


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def agents_below(process):
    """The torchrun agents that a process started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if "engine.train.torchrun.agent" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def machines(lab, wait_until):
    """Steered over two machines, one of which loses its agent, and joins again by itself."""
    place = f"127.0.0.1:{free_port()}"
    run = lab.run("machines", "launch.nodes=2", "launch.processes=1", f"launch.rendezvous={place}")
    run.hold(3, 7)
    run.start_on = lab.popen(*run.arguments, "--headless")
    wait_until(lambda: run.events("alert"), "call for another machine")
    run.call = run.events("alert")[0]["text"]
    helper = lab.popen("join", place, "--wait", 120, stderr=subprocess.STDOUT)
    run.wait_at(3)
    run.beta = run.ctl("beta", "0.2")
    run.pause = run.ctl("pause")
    run.release(3)
    run.wait_for("paused")
    run.paused_at = run.step
    assert run.order("unpause")["status"] == "applied"
    run.wait_at(7)
    run.wait_saved(4)
    (agent,) = agents_below(helper)
    os.kill(agent.pid, signal.SIGKILL)
    run.release(7)
    run.finish()
    run.printed, run.warned = run.start_on.communicate(timeout=60)
    run.joined, _ = helper.communicate(timeout=60)
    run.helper_code = helper.returncode
    yield run
    helper.kill()
    run.end()


def test_the_run_says_how_another_machine_joins(machines):
    assert "rlhf-tui join 127.0.0.1:" in machines.call


def test_a_run_over_two_machines_is_steered_as_one(machines):
    commands = machines.commands()
    assert {c["status"] for c in commands.values()} == {"applied"}
    (beta,) = [c for c in commands.values() if c["command"] == "beta"]
    assert machines.betas()[beta["applied_step"]] == 0.2
    assert machines.paused_at == 3


def test_a_machine_that_is_lost_is_named_and_the_run_goes_on_when_it_is_back(machines):
    (alert,) = [e for e in machines.events("alert") if e["rule"] == "restart"]
    assert "another machine" in alert["text"]
    assert "rlhf-tui join" in alert["text"]
    with machines.record() as record:
        assert [a.from_step for a in record.attempts()] == [0, 4]


def test_it_ends_where_one_machine_ends(machines, whole):
    for one, two in zip(whole.numbers()[:3], machines.numbers()[:3], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (one["step"], name)


def test_the_joined_machine_says_what_it_did_and_ends_with_the_run(machines):
    assert machines.helper_code == 0
    assert machines.joined.count("joining machines") == 2
    assert "the run is over" in machines.joined


def test_an_address_that_is_none_is_one_line(lab):
    done = lab.cli("join", "nowhere")
    assert done.returncode == 2
    assert "HOST:PORT" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_more_machines_need_a_place_to_meet(lab):
    run = lab.run("nowhere", "launch.nodes=2")
    done = lab.cli(*run.arguments, "--headless")
    assert done.returncode == 2
    assert "launch.rendezvous" in done.stderr
    assert not run.session.folder.exists()


def test_a_port_that_is_taken_is_one_sentence_and_leaves_nothing(lab):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        run = lab.run("taken", "launch.nodes=2", f"launch.rendezvous={place}")
        done = lab.cli(*run.arguments, "--headless")
    assert done.returncode == 2
    assert "launch.rendezvous: cannot listen" in done.stderr.splitlines()[-1]
    assert not run.session.folder.exists()
