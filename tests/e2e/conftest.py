"""Whole processes: the real command line on the starter models, and gates that hold a step.

Nothing here is mocked. A run's reward is the starter's reward model and a small Python function
beside it, the *gate*, which waits while a file lies there: a test holds the run inside the step it
means, does what it has to do, and lets it go. So nothing depends on how fast the machine is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.lab import LONG, Lab, Run, numbers, processes, until


@pytest.fixture(scope="session", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything the whole-process tests make; nothing may run on in it when they are over."""
    root = tmp_path_factory.mktemp("e2e")
    yield root
    left = processes(root)
    lines = [" ".join(p.cmdline())[:200] for p in left]
    for process in left:
        process.kill()
    assert not left, f"processes were left behind: {lines}"
    logs = [f for f in root.rglob("engine.log") if b"illegal transition" in f.read_bytes()]
    assert not logs, f"a session's state followed one that it may not follow: {logs}"


@pytest.fixture(scope="session")
def lab(place: Path) -> Lab:
    """The sessions folder most tests share."""
    return Lab(place / "sessions", place / "gates")


@pytest.fixture(scope="session")
def make_lab(place: Path) -> Callable[[str], Lab]:
    """Another sessions folder, at a path below the place."""
    return lambda path: Lab(place / path, place / "gates" / path.replace("/", "_"))


@pytest.fixture(scope="session")
def whole(lab: Lab) -> Iterator[Run]:
    """The undisturbed run of 8 steps, in the foreground."""
    run = lab.run("whole")
    process = lab.popen(*run.arguments, "--headless")
    run.printed, run.warned = process.communicate(timeout=LONG)
    assert process.returncode == 0, run.warned
    yield run
    run.end()


@pytest.fixture(scope="session")
def steered(lab: Lab) -> Iterator[Run]:
    """8 steps: beta by hand from step 4 on, the controller aimed elsewhere from step 6 on."""
    run = lab.run("steered")
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
    yield run
    run.end()


@pytest.fixture(scope="session")
def endless(lab: Lab) -> Iterator[Run]:
    """A run without an end in sight, paused; :func:`training` lets it train."""
    run = lab.run("endless", "train.save_every=0", steps=100_000)
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
def trains(run: Run) -> Iterator[None]:
    """Lets a paused run train for a while."""
    assert run.order("unpause")["status"] == "applied"
    try:
        yield
        before = run.step
        until(lambda: run.step > before, f"step after {before} of {run.name}")
    finally:
        assert run.order("pause")["status"] == "applied"


@pytest.fixture
def training(endless: Run) -> Iterator[Run]:
    """The endless run, training for the length of a test, and seen to do so when that is over."""
    with trains(endless):
        yield endless


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """:func:`until`, for tests."""
    return until


@pytest.fixture(scope="session")
def processes_of() -> Callable[[Path], list[psutil.Process]]:
    """:func:`processes`, for tests."""
    return processes


@pytest.fixture(scope="session", name="numbers")
def numbers_fixture() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """:func:`numbers`, for tests."""
    return numbers
