"""A short real run for pictures."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PAUSED = "reviews"
"""The name of the session."""
OTHER = "reviews-beta"
"""The name of a fork of it, to compare with."""
SMALL = (
    "-o", "rollout.batch_size=16", "-o", "train.save_every=10", "-o", "log.arrays=16",
    "-o", "eval.every=10", "-o", "eval.holdout=16",
)  # fmt: skip


def program(*arguments: str) -> list[str]:
    """The command of this environment, with arguments."""
    return [str(Path(sys.executable).parent / "rlhf-tui"), *arguments]


def ctl(sessions: Path, *arguments: str) -> None:
    """Steers the run and waits until the command applies."""
    run("ctl", "--sessions", str(sessions), "--wait", PAUSED, *arguments)


def run(*arguments: str) -> str:
    """Runs a command and returns what it prints."""
    done = subprocess.run(program(*arguments), check=True, capture_output=True, text=True)
    return done.stdout


def step(sessions: Path) -> int:
    """The last finished step of the run; 0 before there is one."""
    status = json.loads(run("status", "--sessions", str(sessions), PAUSED, "--json"))
    return int(status["step"])


def wait_for_step(sessions: Path, wanted: int) -> None:
    """Waits for a step of the run.

    Raises:
        TimeoutError: it was not reached within ten minutes.
    """
    end = time.monotonic() + 600
    while step(sessions) < wanted:
        if time.monotonic() > end:
            raise TimeoutError(f"step {wanted} was not reached")
        time.sleep(1)


@contextlib.contextmanager
def paused_run(folder: Path) -> Iterator[Path]:
    """A live, paused run with interventions, an alert, evaluations, an abandoned branch and a fork.

    It is ended on leaving.
    """
    sessions = folder / "sessions"
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        os.environ[variable] = str(folder / variable)  # not the operator's preferences
    run("demo", "--detach", "--sessions", str(sessions), "--name", PAUSED, "--steps", "60", *SMALL)
    try:
        wait_for_step(sessions, 12)
        ctl(sessions, "beta", "0.3")
        ctl(sessions, "probe", "The film was")
        run("note", "--sessions", str(sessions), PAUSED, "responses grow warmer")
        wait_for_step(sessions, 22)
        ctl(sessions, "kl", "adaptive", "--target", "0.5")  # the KL is then high: an alert
        wait_for_step(sessions, 28)
        ctl(sessions, "rollback", "20")
        ctl(sessions, "kl", "adaptive", "--target", "4")
        wait_for_step(sessions, 32)
        ctl(sessions, "pause")
        run("fork", "--sessions", str(sessions), PAUSED, "--from", "20", "--name", OTHER,
            "-o", "kl.beta=0.6", "-o", "train.steps=26", "--headless")  # fmt: skip
        yield sessions
    finally:
        ctl(sessions, "stop", "--now")
