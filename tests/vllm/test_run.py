"""Whole runs with vLLM: what becomes of them when processes are killed, and with several ranks."""

import hashlib
import re
import socket
from pathlib import Path

import psutil
import pytest

from engine.session.checkpoints import checkpoint_path
from tests.e2e.lab import Lab, processes
from tests.faults.lab import HOOKS
from tests.vllm.conftest import PYTHON
from tests.waiting import until

STEPS = 6
LIMIT = 900.0
"""Seconds; a minute or two on idle cores."""
OPTIONS = ("rollout.engine=vllm", "train.save_every=2", "rollout.batch_size=8")
AHEAD = ("rollout.ahead=1", "ppo.rollout_correction=truncate", "rollout.engines=2")


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


@pytest.mark.parametrize("options", [(), AHEAD], ids=["in turn", "two engines ahead"])
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
    # A thread that is writing to a busy disk keeps the files of a killed process open.
    until(lambda: not killed.session.is_live(), "release of the lock", 60)
    killed.release(3)
    killed.resume()
    finish(killed)
    finish(undisturbed)
    # Step 3 and step 5 follow a checkpoint.
    assert lags(undisturbed) == ([0, 1, 0, 1, 0, 1] if options else [0] * STEPS)
    assert killed.numbers() == undisturbed.numbers()
    assert policy(killed) == policy(undisturbed)


@pytest.fixture(scope="module")
def one(lab):
    """A run with one rank and one engine."""
    run = make(lab, "one")
    run.start()
    finish(run)
    return run


def responses(run):
    with run.reader() as reader:
        return [(s.step, s.index, s.response) for s in reader.samples.newest()]


def test_two_engines_generate_as_one_and_one_that_is_killed_amid_a_rollout_is_replaced(lab, one):
    marker = lab.root.parent / "killed"
    # _send: Start, LoadWeights and Generate to both engines, then NextTurns for every eighth token.
    place = "engine.train.rollout.vllm.client:RolloutClient._send"
    point = f"{place}|after|9|kill rollout engine 1|{marker}"
    disturbed = Lab(lab.root, lab.root.parent / "more-gates")
    disturbed.environment |= {"PYTHONPATH": str(HOOKS), "RLHF_TUI_TEST_POINT": point}
    two = make(disturbed, "engines", "rollout.engines=2")
    two.start()
    until(marker.exists, "a kill amid a rollout", LIMIT)
    finish(two)
    assert responses(two) == responses(one) != []
    assert [r["objective/scores"] for r in two.numbers()] == [
        r["objective/scores"] for r in one.numbers()
    ]
    said = [e["text"] for e in two.events("alert")]
    assert len([t for t in said if "rollout engine 1 was ended by SIGKILL" in t]) == 1
    assert not [t for t in said if "rollout engine 0" in t]
    log = two.session.log_file.read_text()
    assert len(re.findall("rollout engine 0: weights of step 0,", log)) == 1
    assert len(re.findall("rollout engine 1: weights of step 0,", log)) == 2
    assert not processes(two.session.folder)


def test_an_engine_that_joins_from_another_machine_generates_as_one_here(lab, one):
    """The other machine is this one, with a process of its own; its engine is killed once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    run = make(
        lab, "joined", "rollout.engines=2", "rollout.joined=1", f"rollout.rendezvous={address}"
    )
    run.hold(2)
    run.start()
    secret = run.session.secret_file
    joined = lab.popen("join", address, "--rollout", "--secret-file", secret, "--python", PYTHON)
    try:
        until((run.gate / "at-2").exists, "steps with both engines", LIMIT)
        (engine,) = (
            p for p in psutil.Process(joined.pid).children() if "start.py" in str(p.cmdline())
        )
        engine.kill()
        run.release(2)
        finish(run)
        assert joined.wait(60) == 0
    finally:
        joined.kill()
    assert "the run is over" in joined.stdout.read()
    assert responses(run) == responses(one)
    assert lags(run) == [0] * STEPS
    said = [e["text"] for e in run.events("alert")]
    assert len([t for t in said if "rollout engine 1 ended with status 3" in t]) == 1
    assert not engine.is_running()


def test_two_sharded_ranks_broadcast_the_weights_that_one_writes(lab, one):
    """The engine checks the sum over what it holds; the policy's is that of the first weights."""
    two = make(
        lab, "two", "launch.processes=2", "parallel.strategy=fsdp", "rollout.transfer=broadcast"
    )
    two.start()
    finish(two)
    sums = [
        re.findall(
            r"weights of step 0, (\d+ tensors, checksum \w+)", run.session.log_file.read_text()
        )
        for run in (one, two)
    ]
    assert sums[0] == sums[1] != []
    for ours, theirs in zip(one.numbers(), two.numbers(), strict=True):
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=0.05)


ENVIRONMENT = (
    "environment.factory=repeating:Repeating",
    f"environment.path={Path(__file__).parents[1] / 'train'}",
    "environment.max_tokens=40",
    'rollout.stop=[" a", "the", " is", " and"]',
)
"""Its stop strings are found while vLLM generates."""


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "an engine is killed"])
def test_responses_that_do_not_wait_for_each_other_are_those_that_do(lab, killed):
    name = "killed" if killed else "whole"
    together = make(lab, f"together-{name}", *ENVIRONMENT)
    other = Lab(lab.root, lab.root.parent / f"gates-{name}")
    if killed:  # after Start, LoadWeights and Generate to both engines, when one has got turns
        point = "engine.train.rollout.vllm.client:RolloutClient._send|after|9|kill rollout engine 1"
        other.environment |= {
            "PYTHONPATH": str(HOOKS),
            "RLHF_TUI_TEST_POINT": f"{point}|{lab.root.parent / 'killed-amid-turns'}",
        }
    independent = make(
        other, f"independent-{name}", *ENVIRONMENT, "environment.turns=independent",
        "launch.processes=2", "rollout.engines=2",
    )  # fmt: skip
    for run in (together, independent):
        run.start()
        finish(run)
    said = [e["text"] for e in independent.events("alert")]
    assert len([t for t in said if "rollout engine 1 was ended by SIGKILL" in t]) == killed
    first = [[s for s in responses(run) if s[0] == 1] for run in (together, independent)]
    assert first[0] == first[1] != []
    for ours, theirs in zip(together.numbers(), independent.numbers(), strict=True):
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=0.05)
    assert max(row["environment/turns"] for row in independent.numbers()) > 1
    assert max(row["val/rollout_logprob_gap"] for row in independent.numbers()) < 1e-3
