"""The text of a question about a run is of the run as it is, not as it was when it was asked."""

import contextlib

import pytest

from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import StepReport
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.base import ChoiceDialog, MessageLine
from rlhf_tui.widgets.table import Table
from tests.tui.screen import press_for


@pytest.fixture
def training(session_maker, tmp_path):
    """A session of 60 steps, its last checkpoint of step 50, and the journal of its engine."""
    session = session_maker(tmp_path / "sessions", "frozen", 60)
    lock = session.acquire()
    session.write_engine(str(tmp_path / "no.sock"), "1")
    with contextlib.closing(JournalWriter(session)) as journal:
        journal.begin_attempt(60, fresh=False)
        journal.set_meta(state="running")
        yield session, journal
    lock.release()


def text(app):
    return app.screen.query_one(MessageLine).text()


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [("r", "This abandons 10 steps", "This abandons 11 steps"),
     ("S", "Step 60 is done", "Step 61 is done")],
)  # fmt: skip
async def test_a_question_follows_the_run(training, running, until, key, before, after):
    session, journal = training
    app = RlhfApp(session.folder.parent, session.name)
    async with running(app) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: app.screen.query_one(Table).count() == 1)
        await until(pilot, lambda: app.state.live)
        await press_for(pilot, ChoiceDialog, key)
        await until(pilot, lambda: before in text(app))
        journal.record_step(StepReport(step=61, metrics={}, samples=[], settings={}))
        await until(pilot, lambda: after in text(app))
        await pilot.press("escape")
