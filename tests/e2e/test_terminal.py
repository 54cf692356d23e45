"""The app in a real terminal: dropped connections, signals, lost engines, resizes.

It continues, or it exits and restores the terminal.
"""

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
from tests.variants import some_of
from tests.waiting import until

TITLES = {
    "1": "Newest responses, step 8", "2": "Newest responses, step 8", "3": "RESPONSE", "4": " MB",
    "5": "lines",
}  # fmt: skip
"""Text that identifies each screen."""
SETTLED = 1.0
"""Seconds without output after which the screen of a finished run is complete."""


@pytest.fixture
def attach(tmp_path):
    """Opens the dashboard of a run in a terminal and waits until it shows the run.

    Uses a new state folder: the digest of changes since an earlier test would cover the dashboard.
    """
    opened = []

    def open_on(run, name=None):
        terminal = Terminal(
            run.lab, "attach", name or run.name, XDG_STATE_HOME=str(tmp_path / "state")
        )
        opened.append(terminal)
        until(lambda: "Steering" in terminal.screen, "dashboard")
        return terminal

    yield open_on
    for terminal in opened:
        terminal.close()


def assert_exits(terminal, code):
    until(lambda: terminal.process.poll() is not None, "end of the app")
    assert terminal.process.returncode == code
    until(lambda: terminal.restored, "restored terminal")


def test_a_dropped_connection_ends_the_app_and_leaves_the_engine_training(training, attach):
    terminal = attach(training)
    terminal.hang_up()
    until(lambda: terminal.process.poll() is not None, "end of the app")
    step = training.step
    until(lambda: training.step > step, "step behind a dropped connection")
    again = attach(training)
    until(lambda: "● running" in again.screen, "state running")
    again.type("q")
    assert_exits(again, 0)


@pytest.mark.parametrize(
    ("way", "code"), [("q", 0), ("\x03", 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_every_way_to_exit_restores_the_terminal(endless, attach, way, code):
    terminal = attach(endless)
    if isinstance(way, str):
        terminal.type(way)
    else:
        terminal.process.send_signal(way)
    assert_exits(terminal, code)
    assert f"detached; engine pid {endless.engine().pid} still running" in terminal.screen


@pytest.mark.slow
def test_a_lost_engine_is_shown_and_the_app_continues(lab, attach):
    run = lab.run("dies", "train.save_every=2", steps=1000)
    run.slow_down()
    run.start()
    try:
        terminal = attach(run)
        until(lambda: run.events("checkpoint"), "checkpoint")
        run.engine().kill()
        until(lambda: "✗ crashed" in terminal.screen, "state crashed")
        assert "engine died; resume: rlhf-tui resume dies" in terminal.screen
        terminal.type("p")
        until(lambda: "'dies' has no engine" in terminal.screen, "result of a command")
        assert run.resume().returncode == 0
        until(lambda: "● running" in terminal.screen, "state running again")
        terminal.type("q")
        assert_exits(terminal, 0)
    finally:
        run.end()


def test_a_replaced_journal_is_read_again(lab, whole, attach, tmp_path):
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
        until(lambda: "step 8/8" in terminal.screen, "the old journal")
        for name in ("journal.db", "samples.db"):
            (other.folder / name).replace(lab.root / "swapped" / name)
        until(lambda: "step 3/3" in terminal.screen, "the new journal")
        until(lambda: "7.5" in terminal.screen, "its curve")
        terminal.type("q")
        assert_exits(terminal, 0)
    finally:
        shutil.rmtree(lab.root / "swapped")


def without_ages(screen):
    """The screen without ages and times, which change constantly."""
    return re.sub(r" *\b(\d+[mhd])?\d+[smh]\b *", " ", screen)


@pytest.mark.parametrize("key", some_of({key: key for key in "12345"}, "2", "3"))
def test_a_terminal_shrunk_and_enlarged_shows_the_same_as_before(whole, attach, key):
    terminal = attach(whole)
    terminal.type(key)
    shown = TITLES[key]
    until(lambda: shown in terminal.screen, f"screen {key}")
    until(lambda: "✓ finished" in terminal.screen, "the state")
    until(lambda: terminal.quiet > SETTLED, "a complete screen")
    before = without_ages(terminal.screen)
    terminal.resize(20, 5)
    until(lambda: "? help" in terminal.screen, "the tiny screen")
    terminal.resize(120, 40)
    until(lambda: without_ages(terminal.screen) == before, "the screen as it was")
    terminal.type("q")
    assert_exits(terminal, 0)
