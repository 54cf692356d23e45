"""Whole runs with vLLM: what becomes of them when processes are killed, and with several ranks."""

import hashlib
import json
import re

import psutil
import pytest

from engine.session.checkpoints import checkpoint_path
from engine.session.folder import Session
from tests.e2e.lab import TINY, Lab, numbers, processes, until

STEPS = 6
LIMIT = 900.0
"""Seconds; a minute or two on idle cores."""
OPTIONS = (*TINY, "rollout.engine=vllm", "train.save_every=2", "rollout.batch_size=8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    return Lab(root / "sessions", root / "gates")


def run(lab, name, *options):
    """Starts a run in the background; returns its session."""
    pairs = [x for o in (*OPTIONS, *options) for x in ("-o", o)]
    done = lab.cli("demo", "--steps", str(STEPS), "--name", name, "--detach", *pairs)
    assert done.returncode == 0, done.stderr
    return Session(lab.root / name)


def state(lab, name):
    return json.loads(lab.cli("status", name, "--json").stdout)


def finish(lab, name):
    until(lambda: state(lab, name)["state"] == "finished", f"end of {name}", LIMIT)
    until(lambda: not processes(lab.root / name), "end of all processes", LIMIT)


def engine_process(session):
    """The engine, once it has built its model and generated for a step."""
    found = [p for p in processes(session.folder) if any("start.py" in x for x in p.cmdline())]
    return found[0] if found else None


def policy(session):
    file = checkpoint_path(session.checkpoints, STEPS) / "policy" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def metrics(lab, name):
    rows = json.loads(lab.cli("metrics", name, "--json").stdout)
    assert {row["rollout/version_lag"] for row in rows} == {0}
    return numbers(rows)


def test_kills_of_engine_and_supervisor_change_nothing_and_leave_nothing(lab):
    undisturbed = run(lab, "undisturbed")
    finish(lab, "undisturbed")
    killed = run(lab, "killed")
    until(lambda: state(lab, "killed")["step"] >= 1, "first step", LIMIT)
    engine_process(killed).kill()
    until(lambda: state(lab, "killed")["step"] >= 3, "steps with another engine", LIMIT)
    psutil.Process(state(lab, "killed")["pid"]).kill()
    until(lambda: not processes(killed.folder), "end of engine and ranks", 60)
    assert lab.cli("resume", "killed", "--detach").returncode == 0
    finish(lab, "killed")
    assert metrics(lab, "killed") == metrics(lab, "undisturbed")
    assert policy(killed) == policy(undisturbed)
    events = json.loads(lab.cli("events", "killed", "--json").stdout)
    assert any("SIGKILL: another one is started" in str(e) for e in events)


def test_two_sharded_ranks_send_the_weights_of_one(lab):
    """The engine checks the sum over what it holds; the policy's is that of the first weights."""
    one, two = run(lab, "one"), run(lab, "two", "launch.processes=2", "parallel.strategy=fsdp")
    for name in ("one", "two"):
        finish(lab, name)
    sums = [
        re.findall(r"weights of step 0, (\d+ tensors, checksum \w+)", s.log_file.read_text())
        for s in (one, two)
    ]
    assert sums[0] == sums[1] != []
    for ours, theirs in zip(metrics(lab, "one"), metrics(lab, "two"), strict=True):
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=0.05)
