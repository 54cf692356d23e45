"""Jobs of a scheduler: pre-empted, queued again and resumed (examples/slurm.sh); on two machines.

SLURM is a stub: its commands are scripts, and its variables are set here.

The ranks have no model (tests/faults/light_rank.py): what they train is not the subject.
"""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.e2e.lab import LIGHT, PROGRAM
from tests.waiting import LONG, until

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "sessions-0.1.0"
STUBS = {
    # Leaves a note of a requeue.
    "scontrol": '[ "$1" != requeue ] || echo "$2" > "$REQUEUED"',
    "squeue": "echo 2100-01-01T00:00:00",
    # One task, on this machine.
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; export SLURM_NODEID=0; exec "$@"',
}
CONFIG = f"""
data: {{prompts: {DATA}/prompts.jsonl}}
model: {{policy: {DATA}/policy}}
reward: {{model: "starter:reward"}}
kl: {{controller: fixed}}
train: {{steps: 150, save_every: 5}}
log: {{tensorboard: false}}
launch: {{device: cpu, processes: 1, rendezvous: null}}
"""


@pytest.fixture
def job(make_lab, tmp_path):
    """Starts the example as SLURM does; returns the process of its script."""
    lab = make_lab("slurm")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, script in STUBS.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text(CONFIG)
    environment = lab.environment | {
        "PATH": f"{binaries}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "RLHF_TUI": str(PROGRAM), "SLURM_JOB_ID": "42", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1", **LIGHT,
    }  # fmt: skip

    def start():
        return subprocess.Popen(
            ["sh", str(ROOT / "examples" / "slurm.sh"), str(tmp_path / "run.yaml")],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return lab, start, tmp_path / "requeued"


def test_a_job_whose_time_is_up_saves_is_queued_again_and_resumes_to_its_end(job):
    lab, start, requeued = job
    session = lab.root / "slurm-42"
    first = start()
    saved = session / "checkpoints" / "step-000005" / "COMPLETE"
    until(lambda: saved.exists() or first.poll() is not None, "a checkpoint")
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=LONG)
    assert first.returncode == 75, output
    assert requeued.read_text() == "42\n"
    requeued.unlink()
    status = lab.json("status", "slurm-42")
    assert (status["state"], status["step"] < 150) == ("stopped", True)
    second = start()
    output, _ = second.communicate(timeout=LONG)
    assert second.returncode == 0, output
    assert f"resuming from step {status['step']}" in output
    assert not requeued.exists()
    assert lab.json("status", "slurm-42")["state"] == "finished"


def test_resuming_what_exists_needs_a_name(lab):
    done = lab.cli("run", "no.yaml", "--resume-if-exists", "--headless")
    assert done.returncode == 2
    assert "--resume-if-exists needs --name NAME" in done.stderr


@pytest.fixture
def machines(make_lab, tmp_path):
    """Starts the same command on both machines of a job; their variables differ."""
    lab = make_lab("machines")
    (tmp_path / "run.yaml").write_text(CONFIG)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [str(tmp_path / "run.yaml"), "--port", port]

    def start(number):
        variables = {
            "SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_NODEID": str(number),
            "SLURM_JOB_NODELIST": "127.0.0.1,elsewhere", "SLURM_JOB_END_TIME": "4102444800",
            **LIGHT,
        }  # fmt: skip
        return lab.popen(
            "launch", *words, env=lab.environment | variables, stderr=subprocess.STDOUT
        )

    started = []
    yield lab, lambda: started.extend(map(start, (1, 0))) or started[-2:]
    for process in started:
        process.kill()


@pytest.mark.slow
def test_one_command_on_each_machine_of_a_job_starts_saves_and_resumes_the_run(machines):
    lab, start = machines
    session = lab.root / "slurm-42"
    other, first = start()
    saved = session / "checkpoints" / "step-000005" / "COMPLETE"
    until(lambda: saved.exists() or first.poll() is not None, "a checkpoint")
    assert (session / "join.secret").stat().st_mode & 0o777 == 0o600
    assert lab.json("status", "slurm-42")["deadline"] == 4102444800
    for process in (other, first):  # a job that is pre-empted: all its processes are signalled
        process.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=LONG)
    assert first.returncode == 75, output
    output, _ = other.communicate(timeout=LONG)
    assert (other.returncode, "the run is over" in output) == (75, True), output
    assert not (session / "join.secret").exists()
    assert lab.json("status", "slurm-42")["state"] == "stopped"
    other, first = start()  # queued again
    output, _ = first.communicate(timeout=LONG)
    assert first.returncode == 0, output
    assert "resuming from step" in output
    output, _ = other.communicate(timeout=LONG)
    assert (other.returncode, "the run is over" in output) == (0, True), output
    assert [p.wait(LONG) for p in start()] == [0, 0]  # it has finished


def test_a_machine_that_no_scheduler_placed_is_an_error_that_says_so(lab, tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = lab.cli(
        "launch", tmp_path / "run.yaml", "-o", "launch.nodes=2", "-o", "launch.rendezvous=a:1"
    )
    assert done.returncode == 2
    assert "no scheduler says which of the machines this is" in done.stderr
    assert len(done.stderr.splitlines()) == 1
