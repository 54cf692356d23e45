"""Fixtures for tests of whole processes: the real command line on the starter models.

Nothing is mocked. The reward of a run combines the starter's reward model with a Python function,
the *gate*, which blocks a step while a certain file exists. A test blocks the run inside a step,
acts, and releases it, so the tests do not depend on the speed of the machine.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.protocol.commands import Pause, Unpause
from tests.e2e.lab import OLD_SESSIONS, Lab, Once, Run, processes
from tests.variants import some_of
from tests.waiting import LONG, until


@pytest.fixture(scope="session", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for all files of these tests; fails if processes are left at the end."""
    root = tmp_path_factory.mktemp("e2e")
    yield root
    remaining = processes(root)
    lines = [" ".join(p.cmdline())[:200] for p in remaining]
    for process in remaining:
        process.kill()
    assert not remaining, f"processes were left behind: {lines}"
    logs = [f for f in root.rglob("engine.log") if b"illegal transition" in f.read_bytes()]
    assert not logs, f"a session made an illegal state transition: {logs}"


@pytest.fixture(scope="session")
def lab(place: Path) -> Lab:
    """The sessions folder that most tests share."""
    return Lab(place / "sessions", place / "gates")


@pytest.fixture
def old(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A copy of the old sessions."""
    folder = tmp_path_factory.mktemp("old", numbered=True)
    shutil.copytree(OLD_SESSIONS, folder, dirs_exist_ok=True)
    for name in ("config.yaml", "engine.json"):
        for path in folder.rglob(name):
            path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
    yield Lab(folder / "sessions", folder / "gates")
    assert not processes(folder)


@pytest.fixture(scope="session")
def make_lab(place: Path) -> Callable[[str], Lab]:
    """Creates another sessions folder at a relative path."""
    return lambda path: Lab(place / path, place / "gates" / path.replace("/", "_"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Where the test processes of this session share finished runs."""
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return Once(folder / "shared-runs")


def uninterrupted(run: Run, once: Once) -> Run:
    """A foreground run, to its end."""

    def make(run: Run) -> None:
        process = run.lab.popen(*run.arguments, "--headless")
        printed, warned = process.communicate(timeout=LONG)
        assert process.returncode == 0, warned
        (run.session.folder / "printed.txt").write_text(printed)
        (run.session.folder / "warned.txt").write_text(warned)

    once.made(run, make)
    run.printed = (run.session.folder / "printed.txt").read_text()
    run.warned = (run.session.folder / "warned.txt").read_text()
    return run


@pytest.fixture(scope="session")
def whole(lab: Lab, once: Once) -> Run:
    """An uninterrupted foreground run of 8 steps."""
    return uninterrupted(lab.run("whole"), once)


KINDS = some_of({"light": True, "model": False}, "light")
"""Ranks without a model, which every change runs, and real ones, which `make test-all` runs too."""


@pytest.fixture(scope="module", params=KINDS)
def either_lab(request: pytest.FixtureRequest, make_lab: Callable[[str], Lab]) -> Lab:
    """A module's own sessions folder, for what the supervisor and its clients do with any ranks."""
    module = request.module.__name__.rpartition(".")[2]
    if request.param:
        return make_lab(f"{module}/light").with_light_ranks()
    return make_lab(f"{module}/model")


@pytest.fixture(scope="module")
def undisturbed(either_lab: Lab, once: Once, request: pytest.FixtureRequest) -> Run:
    """An uninterrupted foreground run of 8 steps with ranks of the same kind."""
    if not either_lab.is_light:
        run: Run = request.getfixturevalue("whole")
        return run
    return uninterrupted(either_lab.run("undisturbed"), once)


@pytest.fixture(scope="session")
def branch(lab: Lab, whole: Run, once: Once) -> Run:
    """A fork of the uninterrupted run at step 4, with another beta; its update of step 9 fails."""

    def make(run: Run) -> None:
        run.score_at(9, "fail no more")
        limit = "launch.max_restarts=0"
        keys = ("kl.beta=0.5", f"reward.path={run.gate}", "train.steps=9", limit)
        options = [word for key in keys for word in ("-o", key)]
        fork = ("fork", "whole", "--from", "4", "--name", "branch")
        done = lab.cli(*fork, *options, "--headless")
        assert done.returncode == 1, done.stderr
        (run.session.folder / "warned.txt").write_text(done.stderr)
        (run.session.folder / "ended.txt").write_text(run.state)  # one test resumes it

    run = once.made(lab.run("branch"), make)
    run.warned = (run.session.folder / "warned.txt").read_text()
    run.ended = (run.session.folder / "ended.txt").read_text()
    return run


@pytest.fixture(scope="session")
def steered(lab: Lab, once: Once) -> Run:
    """A run of 8 steps; beta is set at step 4, the controller and learning rate at step 6."""
    return once.made(lab.run("steered"), make_steered)


def make_steered(run: Run) -> None:
    """Starts the run and steers it to its end."""
    run.hold(3, 5)
    run.start()
    run.wait_at(3)
    assert run.ctl("beta", "0.2", "--id", "to-0.2").returncode == 0
    run.release(3)
    run.wait_at(5)
    assert run.ctl("kl", "adaptive", "--target", "2", "--horizon", "50", "--id", "aim").stdout
    assert run.ctl("set", "learning_rate=1e-4", "--id", "slower").returncode == 0
    run.release(5)
    run.finish()


@pytest.fixture(scope="session")
def endless(lab: Lab) -> Iterator[Run]:
    """A paused run of very many steps; :func:`training` unpauses it for one test.

    Its rank has no model: the tests that share it are of the supervisor and its clients.
    """
    run = lab.with_light_ranks().run("endless", "train.save_every=0", steps=100_000)
    run.slow_down()  # tests let it train while they wait
    run.hold(3)
    run.start()
    run.wait_at(3)
    assert run.ctl("pause").returncode == 0
    run.release(3)
    run.wait_for("paused")
    yield run
    run.ctl("stop", "--now")
    run.wait_gone()


@contextmanager
def unpaused(run: Run) -> Iterator[None]:
    """Context in which a paused run trains; fails if no step completes."""
    assert run.send(Unpause()).status == "applied"
    try:
        yield
        before = run.step
        until(lambda: run.step > before, f"step after {before} of {run.name}")
    finally:
        assert run.send(Pause()).status == "applied"


@pytest.fixture
def training(endless: Run) -> Iterator[Run]:
    """The endless run, training during one test; fails if it has stopped training."""
    with unpaused(endless):
        yield endless
