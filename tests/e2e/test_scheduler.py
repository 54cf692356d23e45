"""A batch job that is pre-empted, queued again and resumed: examples/slurm.sh, SLURM being a stub.

The ranks have no model (tests/faults/light_rank.py): what they train is not the subject.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.lab import LONG, PROGRAM, until

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "sessions-0.1.0"
STUB = """#!/bin/sh
# scontrol: `show hostnames` names this machine; `requeue` leaves a note of it.
case "$1" in
    show) echo localhost ;;
    requeue) echo "$2" > "$REQUEUED" ;;
esac
"""
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
    (binaries / "scontrol").write_text(STUB)
    (binaries / "scontrol").chmod(0o755)
    (tmp_path / "run.yaml").write_text(CONFIG)
    environment = lab.environment | {
        "PATH": f"{binaries}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "RLHF_TUI": str(PROGRAM), "SLURM_JOB_ID": "42", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost", "RLHF_TUI_TEST_LIGHT": "0.02",
        "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'hooks'}:{ROOT}",
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
