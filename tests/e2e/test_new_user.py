"""A complete session of a new user in a real terminal, driven by keys and checked on screen."""

import json
import math
import re
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.terminal import Terminal
from tests.waiting import until

QUICK = (
    "rollout.batch_size=32", "rollout.max_new_tokens=16", "ppo.advantage=rloo",
    "train.learning_rate=1e-3", "kl.controller=fixed", "kl.beta=0.02", "train.save_every=0",
    "log.tensorboard=false", "launch.device=cpu", "launch.threads=1",
)  # fmt: skip
"""A fast demo: at this learning rate the score rises by RISE within about ten steps."""
RISE = 1.0
"""About the standard deviation of the starter reward's scores in a step before training."""


def two_minutes_ago(seen):
    """Moves the last visit into the past; the digest appears only after a minute of absence."""
    visits = json.loads(seen.read_text())
    for entry in visits.values():
        entry["time"] -= 120
    seen.write_text(json.dumps(visits))


def score_of(terminal):
    """The latest score shown above its chart; minus infinity before the first step."""
    found = re.search(r"▸score\b.*?(-?\d+\.\d{3})\s+KL\b", terminal.screen)
    return float(found[1]) if found else -math.inf


@pytest.fixture
def run(make_lab):
    lab = make_lab("new-user")
    run = lab.run("first")
    yield run
    run.end()


def test_a_complete_session_of_a_new_user(run):
    lab = run.lab
    overrides = [word for key in QUICK for word in ("-o", key)]
    with closing(Terminal(lab, "demo", "--name", run.name, *overrides)) as terminal:
        until(lambda: score_of(terminal) > -math.inf, "score of the first step")
        first = score_of(terminal)
        until(lambda: score_of(terminal) >= first + RISE, f"rise of the score from {first}")
        terminal.type("p")
        run.wait_for("paused")
        until(lambda: "‖ paused" in terminal.screen, "pause on the screen")
        terminal.type("b")
        until(lambda: "kl.beta, now" in terminal.screen, "dialog for beta")
        terminal.type("0.3")  # replaces the current value
        until(lambda: "0.02 → 0.3" in terminal.screen, "preview of 0.3")
        terminal.type("\r")
        until(lambda: re.search(r"beta +0\.3000", terminal.screen), "beta of 0.3")
        terminal.type("p")
        run.wait_for("running")
        terminal.type("c")
        until(lambda: run.events("checkpoint"), "checkpoint")
        terminal.type("3")
        until(lambda: "RESPONSE" in terminal.screen, "sample to read")
        terminal.type("q")
        until(lambda: terminal.process.poll() is not None, "end of the app")
        until(lambda: terminal.restored, "restored terminal")
        assert re.search(r"detached; engine pid \d+ still running", terminal.screen)
    assert run.engine().is_running()
    step = run.step
    until(lambda: run.step > step, "step behind a closed terminal")
    assert run.command("beta", "0.25")["status"] == "applied"

    two_minutes_ago(Path(lab.environment["XDG_STATE_HOME"]) / "rlhf-tui" / "seen.json")
    with closing(Terminal(lab, "attach", run.name)) as terminal:
        until(lambda: "since you left" in terminal.screen.lower(), "digest")
        assert "0.3 → 0.25" in terminal.screen, "the digest does not show the change"
        terminal.type("o")
        until(lambda: "since you left" not in terminal.screen.lower(), "end of the digest")
        # The dialog disappears before the screen below is drawn again.
        until(lambda: marked(terminal.screen), "markers of the changes on the curves")
        until(lambda: "▲ checkpoint" in terminal.screen, "checkpoint in the timeline")
        terminal.type("S")
        until(lambda: f"Stop {run.name}?" in terminal.screen, "dialog to stop")
        terminal.type("\r")  # the safe choice has the focus: save, then stop
        run.wait_for("stopped")
        until(lambda: f"rlhf-tui resume {run.name}" in terminal.screen, "how to resume")
        terminal.type("q")
        until(lambda: terminal.process.poll() is not None, "end of the app")
    run.wait_gone()
    last = run.step
    assert max(c.step for c in run.reader().checkpoints()) == last

    with closing(Terminal(lab, "resume", run.name, "-o", f"train.steps={last + 2}")) as terminal:
        until(lambda: "✓ finished" in terminal.screen, "end of the run")
        terminal.type("q")
        until(lambda: terminal.process.poll() == 0, "end of the app")
    assert run.step == last + 2
    assert run.betas()[last + 1] == 0.25


@pytest.mark.slow
def test_who_goes_straight_to_run_reads_what_check_notes(lab):
    run = lab.run("straight", "kl.horizon=10000", steps=60)
    run.hold(1)
    try:
        assert "rlhf-tui: note: the adaptive controller changes beta" in run.start().stderr
        (ready,) = run.events("ready")
        assert "kl.horizon: " in ready["notes"][0]
    finally:
        run.end()


def marked(screen):
    """Whether the axis below a curve has the marker of a change."""
    return any("◆" in line for line in screen.splitlines() if "──" in line)
