"""Whole runs with vLLM: what becomes of them when processes are killed, and with several ranks."""

import hashlib
import re

import pytest

from engine.session.checkpoints import checkpoint_path
from tests.e2e.lab import Lab, processes, until

STEPS = 6
LIMIT = 900.0
"""Seconds; a minute or two on idle cores."""
OPTIONS = ("rollout.engine=vllm", "train.save_every=2", "rollout.batch_size=8")
AHEAD = ("rollout.ahead=1", "ppo.rollout_correction=truncate")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    return Lab(root / "sessions", root / "gates")


def make(lab, name, *options):
    return lab.run(name, *OPTIONS, *options, steps=STEPS)


def finish(run):
    until(lambda: run.state in ("finished", "failed"), f"end of {run.name}", LIMIT)
    run.finish()


def engine_process(run):
    """The engine."""
    found = [p for p in processes(run.session.folder) if any("start.py" in x for x in p.cmdline())]
    return found[0]


def policy(run):
    file = checkpoint_path(run.session.checkpoints, STEPS) / "policy" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lags(run):
    return [row["rollout/version_lag"] for row in run.numbers()]


@pytest.mark.parametrize("options", [(), AHEAD], ids=["in turn", "ahead"])
def test_kills_of_engine_and_supervisor_change_nothing_and_leave_nothing(lab, options):
    """Each kill is of a run that is held, so that it is known what each process does then."""
    name = "ahead" if options else "turn"
    undisturbed = make(lab, f"undisturbed-{name}", *options)
    undisturbed.start()
    killed = make(lab, f"killed-{name}", *options)
    killed.hold(1, 3)
    killed.start()
    until((killed.gate / "at-1").exists, "responses of the first step", LIMIT)
    engine_process(killed).kill()
    ended = re.compile("SIGKILL.*: another one is started")
    until(
        lambda: any(ended.search(str(e)) for e in killed.events("alert")),
        "notice of the engine's end", LIMIT,
    )  # fmt: skip
    killed.release(1)
    until((killed.gate / "at-3").exists, "steps with another engine", LIMIT)
    killed.engine().kill()
    until(lambda: not processes(killed.session.folder), "end of engine and ranks", 60)
    killed.release(3)
    killed.resume()
    finish(killed)
    finish(undisturbed)
    # Step 3 and step 5 follow a checkpoint.
    assert lags(undisturbed) == ([0, 1, 0, 1, 0, 1] if options else [0] * STEPS)
    assert killed.numbers() == undisturbed.numbers()
    assert policy(killed) == policy(undisturbed)


def test_two_sharded_ranks_broadcast_the_weights_that_one_writes(lab):
    """The engine checks the sum over what it holds; the policy's is that of the first weights."""
    one = make(lab, "one")
    two = make(
        lab, "two", "launch.processes=2", "parallel.strategy=fsdp", "rollout.transfer=broadcast"
    )
    for run in (one, two):
        run.start()
        finish(run)
    sums = [
        re.findall(
            r"weights of step 0, (\d+ tensors, checksum \w+)", run.session.log_file.read_text()
        )
        for run in (one, two)
    ]
    assert sums[0] == sums[1] != []
    for ours, theirs in zip(one.numbers(), two.numbers(), strict=True):
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=0.05)
