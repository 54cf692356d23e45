"""A new user's whole way, through a real terminal: keys go in, the journal tells the outcome."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e.terminal import Terminal


def two_minutes_ago(seen):
    """Moves what was seen last into the past: within a minute nobody counts as away."""
    known = json.loads(seen.read_text())
    for entry in known.values():
        entry["time"] -= 120
    seen.write_text(json.dumps(known))


@pytest.fixture
def run(make_lab):
    lab = make_lab("new-user")
    run = lab.run("first")
    yield run
    run.end()


def test_the_whole_way_of_a_new_user(run, wait_until):
    lab = run.lab
    keys = ("rollout.batch_size=16", "rollout.max_new_tokens=12", "launch.threads=1")
    overrides = [word for key in keys for word in ("-o", key)]
    terminal = Terminal(lab, "demo", "--name", run.name, *overrides)
    try:
        wait_until(lambda: "Dashboard" in terminal.text, "dashboard")
        wait_until(lambda: run.session.journal_file.exists() and run.step >= 2, "two steps")
        terminal.type("p")
        run.wait_for("paused")
        terminal.type("b")
        wait_until(lambda: "kl.beta, now" in terminal.text, "dialog for beta")
        terminal.type("0.3")  # in the place of the value that is there
        wait_until(lambda: "→ 0.3" in terminal.text, "what 0.3 would do")
        terminal.type("\r")
        wait_until(lambda: run.events("command")[-1].get("new") == 0.3, "beta of 0.3")
        terminal.type("c")
        wait_until(lambda: run.events("checkpoint"), "checkpoint")
        terminal.type("3")
        wait_until(lambda: "ANSWER" in terminal.text, "sample to read")
        terminal.type("2p")
        run.wait_for("running")
        terminal.type("q")
        wait_until(lambda: terminal.process.poll() is not None, "end of the app")
        assert re.search(r"detached; engine pid \d+ still running", terminal.text)
    finally:
        terminal.close()
    assert run.engine().is_running()
    step = run.step
    wait_until(lambda: run.step > step, "step behind a closed terminal")
    assert run.order("beta", "0.25")["status"] == "applied"

    two_minutes_ago(Path(lab.environment["XDG_STATE_HOME"]) / "rlhf-tui" / "seen.json")
    terminal = Terminal(lab, "attach", run.name)
    try:
        wait_until(lambda: "Since you left" in terminal.text, "digest")
        assert "0.25" in terminal.text, "the digest does not tell of the change from outside"
        assert "◆" in terminal.text, "the change of beta is no marker on the curves"
        drawn = len(terminal.raw)
        terminal.type("o")
        wait_until(lambda: len(terminal.raw) > drawn, "end of the digest")
        terminal.type("q")
        wait_until(lambda: terminal.process.poll() is not None, "end of the app")
    finally:
        terminal.close()

    assert run.order("stop")["status"] == "applied"
    last = run.step
    done = lab.cli("resume", run.name, "--headless", "-o", f"train.steps={last + 1}")
    assert done.returncode == 0, done.stderr
    assert run.step == last + 1
    assert 0.2 < run.betas()[last + 1] < 0.3
