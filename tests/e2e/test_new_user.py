"""A new user's whole way, through a real terminal: keys go in, and what comes is read off it."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.e2e.terminal import Terminal

QUICK = (
    "rollout.batch_size=32", "rollout.max_new_tokens=16", "ppo.advantage=rloo",
    "train.learning_rate=1e-3", "kl.controller=fixed", "kl.beta=0.02", "train.save_every=0",
    "log.tensorboard=false", "launch.device=cpu", "launch.threads=1",
)  # fmt: skip
"""The demo in a hurry: with so high a rate the score rises by its first spread within ten steps."""
RISE = 1.0
"""The starter reward's scores of a step spread by about as much before training."""


def two_minutes_ago(seen):
    """Moves what was seen last into the past: within a minute nobody counts as away."""
    known = json.loads(seen.read_text())
    for entry in known.values():
        entry["time"] -= 120
    seen.write_text(json.dumps(known))


def score_of(terminal):
    """The newest score, as it stands above its chart; below everything before the first step."""
    found = re.search(r"▸score\b.*?(-?\d+\.\d{3})\s+KL\b", terminal.screen)
    return float(found[1]) if found else -math.inf


@pytest.fixture
def run(make_lab):
    lab = make_lab("new-user")
    run = lab.run("first")
    yield run
    run.end()


def test_the_whole_way_of_a_new_user(run, wait_until):
    lab = run.lab
    overrides = [word for key in QUICK for word in ("-o", key)]
    terminal = Terminal(lab, "demo", "--name", run.name, *overrides)
    try:
        wait_until(lambda: score_of(terminal) > -math.inf, "score of the first step")
        first = score_of(terminal)
        wait_until(lambda: score_of(terminal) >= first + RISE, f"rise of the score from {first}")
        terminal.type("p")
        run.wait_for("paused")
        wait_until(lambda: "‖ paused" in terminal.screen, "word of the pause")
        terminal.type("b")
        wait_until(lambda: "kl.beta, now" in terminal.screen, "dialog for beta")
        terminal.type("0.3")  # in the place of the value that is there
        wait_until(lambda: "0.02 → 0.3" in terminal.screen, "what 0.3 would do")
        terminal.type("\r")
        wait_until(lambda: re.search(r"beta +0\.3000", terminal.screen), "beta of 0.3")
        terminal.type("p")
        run.wait_for("running")
        terminal.type("c")
        wait_until(lambda: run.events("checkpoint"), "checkpoint")
        terminal.type("3")
        wait_until(lambda: "ANSWER" in terminal.screen, "sample to read")
        terminal.type("q")
        wait_until(lambda: terminal.process.poll() is not None, "end of the app")
        wait_until(lambda: terminal.given_back, "terminal given back")
        assert re.search(r"detached; engine pid \d+ still running", terminal.screen)
    finally:
        terminal.close()
    assert run.engine().is_running()
    step = run.step
    wait_until(lambda: run.step > step, "step behind a closed terminal")
    assert run.order("beta", "0.25")["status"] == "applied"

    two_minutes_ago(Path(lab.environment["XDG_STATE_HOME"]) / "rlhf-tui" / "seen.json")
    terminal = Terminal(lab, "attach", run.name)
    try:
        wait_until(lambda: "since you left" in terminal.screen, "digest")
        assert "0.3 → 0.25" in terminal.screen, "the digest does not tell of the change"
        terminal.type("o")
        wait_until(lambda: "since you left" not in terminal.screen, "end of the digest")
        # The dialog goes before what lay under it is drawn again.
        wait_until(lambda: marked(terminal.screen), "markers of the changes on the curves")
        wait_until(lambda: "▲ checkpoint" in terminal.screen, "checkpoint among what happened")
        terminal.type("S")
        wait_until(lambda: f"Stop {run.name}?" in terminal.screen, "dialog to stop")
        terminal.type("\r")  # the safe answer has the focus: save, then stop
        run.wait_for("stopped")
        wait_until(lambda: f"rlhf-tui resume {run.name}" in terminal.screen, "how to go on")
        terminal.type("q")
        wait_until(lambda: terminal.process.poll() is not None, "end of the app")
    finally:
        terminal.close()
    run.wait_gone()
    last = run.step
    assert max(c.step for c in run.record().checkpoints()) == last

    terminal = Terminal(lab, "resume", run.name, "-o", f"train.steps={last + 2}")
    try:
        wait_until(lambda: "✓ finished" in terminal.screen, "end of the run")
        terminal.type("q")
        wait_until(lambda: terminal.process.poll() == 0, "end of the app")
    finally:
        terminal.close()
    assert run.step == last + 2
    assert run.betas()[last + 1] == 0.25


def marked(screen):
    """Whether a change stands on the axis below a curve."""
    return any("◆" in line for line in screen.splitlines() if "──" in line)
