"""Fixtures of the rank tests: runs of the starter models in the test process."""

import socket
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engine import starter
from engine.config import file as config_file
from engine.launch import environment
from engine.protocol.rank_messages import Begin, RankHello
from engine.session.folder import create
from engine.train.boundary import Boundary
from engine.train.distributed.ranks import RankGroup
from engine.train.link import Link
from engine.train.load import load_run
from engine.train.reward_scales import fit_scales
from engine.train.run import PhaseTimes
from engine.train.step import train_step
from tests.train.half_models import write_half
from tests.train.reward_inputs import three_responses
from tests.train.stand_in_engine import StandInEngine
from tests.train.supervisor_end import METRICS, Supervisor

torch.set_num_threads(1)  # models this small gain nothing from more

SMALL = (
    "rollout.batch_size=8",
    "rollout.max_new_tokens=10",
    "ppo.epochs=2",
    "ppo.minibatches=2",
    "ppo.micro_batch_size=4",
    "kl.horizon=100",
    "launch.threads=1",  # models this small gain nothing from more threads
)


@pytest.fixture(scope="module")
def tokenizer():
    """The starter policy's. Tests must not change it."""
    return AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))


@pytest.fixture
def inputs(tokenizer):
    """Three responses to score."""
    return three_responses(tokenizer)


@pytest.fixture(scope="session")
def half_policy(tmp_path_factory):
    """The folder of the starter policy with half of its layers."""
    return write_half("policy", tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="session")
def half_models(half_policy, tmp_path_factory):
    """Keys for runs of the starter models with half of their layers."""
    reward = write_half("reward", tmp_path_factory.mktemp("half"))
    return f"model.policy={half_policy}", f"reward.model={reward}"


@pytest.fixture
def make_run(tmp_path, half_models):
    """Returns a function that builds a run of :func:`half_models`, with keys overridden."""
    made = []

    def make(*overrides, begin=None, config=None, device=None):
        given = [*SMALL, *half_models, *overrides]
        loaded = config or config_file.load(starter.FOLDER / "demo.yaml", given)
        session = create(tmp_path, f"s{len(made)}", loaded)
        made.append(session)
        begin_at = begin or Begin(attempt=1, from_step=0)
        ranks = RankGroup(loaded.launch)
        ranks.device = device or ranks.device
        run = load_run(session, loaded, begin_at, ranks)
        fit_scales(run, loaded)
        return run, session

    return make


@pytest.fixture(scope="module")
def shared_runs():
    """The runs of :func:`shared_run` with their weights, by overrides and steps."""
    return {}


@pytest.fixture
def shared_run(shared_runs, make_run, tmp_path):
    """Returns a function like that of `make_run`, for tests that train the run no further.

    Loading a run and a first step take a second, so the tests of a module share the models and the
    optimiser. A test's session, configuration and state are its own.
    """
    used = []

    def share(*overrides, steps=0):
        key = (overrides, steps)
        if key not in shared_runs:
            run, _ = make_run(*overrides)
            for step in range(1, steps + 1):
                train_step(run, step)
                run.state.step = step
            shared_runs[key] = run, [p.detach().clone() for p in run.policy.parameters()]
        run, weights = shared_runs[key]
        used.append((run, weights))
        session = create(tmp_path / "shared", f"s{len(used)}", run.config)
        return replace(run, state=deepcopy(run.state), times=PhaseTimes()), session

    yield share
    for run, weights in used:
        now = run.policy.parameters()
        assert all(map(torch.equal, now, weights)), "a test has trained a run that others use"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A stand-in for a rollout engine of its own."""
    folder = tmp_path / "engine"
    folder.mkdir()
    made = StandInEngine(folder, monkeypatch)
    yield made
    made.listener.close()


@pytest.fixture
def second_engine(engine, tmp_path, monkeypatch):
    """A stand-in for the second of two engines; `engine` is the first."""
    made = StandInEngine(tmp_path / "engine", monkeypatch, 1)
    yield made
    made.listener.close()


@pytest.fixture
def write_prompts(tmp_path):
    """Returns a function that writes a prompt file and returns its path."""

    def write(name: str, text: str) -> str:
        path = Path(tmp_path) / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def assert_same_step():
    """Returns a check that two runs take bitwise equal steps: every metric and parameter."""

    def check(run, again, step):
        (ours, _), (theirs, _) = train_step(run, step), train_step(again, step)
        for name, number in ours.items():
            if not name.startswith(("time/", "perf/")):
                assert theirs[name] == number, name
        for (name, one), two in zip(
            run.policy.named_parameters(), again.policy.parameters(), strict=True
        ):
            assert torch.equal(one, two), name

    return check


@pytest.fixture
def supervisor(tmp_path):
    return Supervisor(tmp_path)


@pytest.fixture
def link(supervisor, monkeypatch):
    """Rank 0's link to the supervisor."""
    monkeypatch.setenv(environment.SOCKET_VARIABLE, str(supervisor.path))
    monkeypatch.setenv(environment.TOKEN_VARIABLE, "token")
    return Link(0)


@pytest.fixture
def trained(shared_run, supervisor, link):
    """A run as after its first step, with its boundary and its supervisor."""
    run, session = shared_run("train.save_every=1", "train.keep_last=1", "train.keep_best=0")
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), link)
    boundary.after_step(1, dict(METRICS), 0.1)
    supervisor.wait_for(RankHello)
    yield run, session, boundary, supervisor
    supervisor.may_confirm.set()
    boundary.close()
    supervisor.peer.shutdown(socket.SHUT_RDWR)
    supervisor.listener.close()
