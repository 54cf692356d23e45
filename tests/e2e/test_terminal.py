"""What may happen to a terminal, and to what it looks at: the app says so and goes on, or leaves
with the terminal as it was."""

import re
import shutil
import signal

import pytest

from engine import starter
from engine.config import file as config_file
from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import StepReport
from engine.session.folder import create
from tests.e2e.terminal import Terminal

TITLES = {
    "1": "enter", "2": "Newest responses, step 8", "3": "RESPONSE", "4": " MB", "5": "lines",
}  # fmt: skip
"""What tells a screen from the others."""
SETTLED = 1.0
"""Seconds without a stroke, of a run that is over, after which nothing more is on its way."""


@pytest.fixture
def attach(wait_until, tmp_path):
    """The dashboard of a run on a terminal, once it shows the run.

    As on a first visit: the digest of what happened since another test's would lie over it.
    """
    opened = []

    def open_on(run, name=None):
        terminal = Terminal(
            run.lab, "attach", name or run.name, XDG_STATE_HOME=str(tmp_path / "state")
        )
        opened.append(terminal)
        wait_until(lambda: "Steering" in terminal.screen, "dashboard")
        return terminal

    yield open_on
    for terminal in opened:
        terminal.close()


@pytest.fixture
def leaves(wait_until):
    def expect(terminal, code):
        assert wait_until(lambda: terminal.process.poll() is not None, "end of the app")
        assert terminal.process.returncode == code
        wait_until(lambda: terminal.given_back, "terminal given back")

    return expect


def test_a_dropped_connection_ends_the_app_and_leaves_the_engine_training(
    training, attach, wait_until, leaves
):
    terminal = attach(training)
    terminal.hang_up()
    wait_until(lambda: terminal.process.poll() is not None, "end of the app")
    step = training.step
    wait_until(lambda: training.step > step, "step behind a dropped connection")
    again = attach(training)
    wait_until(lambda: "● running" in again.screen, "word that it runs")
    again.type("q")
    leaves(again, 0)


@pytest.mark.parametrize(
    ("way", "code"), [("q", 0), ("\x03", 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_however_it_is_left_the_terminal_is_as_it_was(endless, attach, leaves, way, code):
    terminal = attach(endless)
    if isinstance(way, str):
        terminal.type(way)
    else:
        terminal.process.send_signal(way)
    leaves(terminal, code)
    assert f"detached; engine pid {endless.engine().pid} still running" in terminal.screen


def test_an_engine_that_dies_is_said_and_the_app_goes_on(lab, attach, leaves, wait_until):
    run = lab.run("dies", "train.save_every=2", steps=1000)
    run.start()
    try:
        terminal = attach(run)
        wait_until(lambda: run.events("checkpoint"), "checkpoint")
        run.engine().kill()
        wait_until(lambda: "✗ crashed" in terminal.screen, "word of the end")
        assert "engine died; resume: rlhf-tui resume dies" in terminal.screen
        terminal.type("p")
        wait_until(lambda: "no engine runs 'dies'" in terminal.screen, "answer to a command")
        assert run.resume().returncode == 0
        wait_until(lambda: "● running" in terminal.screen, "word that it runs again")
        terminal.type("q")
        leaves(terminal, 0)
    finally:
        run.end()


def test_a_journal_that_is_replaced_is_read_anew(lab, whole, attach, leaves, wait_until, tmp_path):
    shutil.copytree(whole.session.folder, lab.root / "swapped")
    other = create(tmp_path, "other", config_file.load(starter.FOLDER / "demo.yaml"))
    journal = JournalWriter(other)
    journal.begin_attempt(0, fresh=False)
    journal.set_meta(state="finished", total_steps=3, message="", settings={})
    for step in (1, 2, 3):
        metrics = {"objective/scores": 7.5}
        journal.record_step(StepReport(step=step, metrics=metrics, samples=[], settings={}))
    journal.close()
    try:
        terminal = attach(whole, "swapped")
        wait_until(lambda: "step 8/8" in terminal.screen, "the old journal")
        for name in ("journal.db", "samples.db"):
            (other.folder / name).replace(lab.root / "swapped" / name)
        wait_until(lambda: "step 3/3" in terminal.screen, "the new journal")
        wait_until(lambda: "7.5" in terminal.screen, "its curve")
        terminal.type("q")
        leaves(terminal, 0)
    finally:
        shutil.rmtree(lab.root / "swapped")


def without_ages(screen):
    """The same while time goes by."""
    return re.sub(r" *\b(\d+[mhd])?\d+[smh]\b *", " ", screen)


@pytest.mark.parametrize("key", "12345")
def test_a_terminal_made_tiny_and_large_again_shows_the_same_as_before(
    whole, attach, leaves, wait_until, key
):
    terminal = attach(whole)
    terminal.type(key)
    shown = TITLES[key]
    wait_until(lambda: shown in terminal.screen, f"screen {key}")
    wait_until(lambda: "✓ finished" in terminal.screen, "the state")
    wait_until(lambda: terminal.quiet > SETTLED, "a screen at rest")
    before = without_ages(terminal.screen)
    terminal.resize(20, 5)
    wait_until(lambda: "? help" in terminal.screen, "the tiny screen")
    terminal.resize(120, 40)
    wait_until(lambda: without_ages(terminal.screen) == before, "the screen as it was")
    terminal.type("q")
    leaves(terminal, 0)
