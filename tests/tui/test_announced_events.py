"""Alerts and failures of the open run are announced on every screen, each once."""

import contextlib
import time

import pytest

from engine.journal.rows import AlertEvent, EventRow
from engine.journal.writer import JournalWriter
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.app.digest import MAX_ANNOUNCED
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.messages import SessionUpdated
from rlhf_tui.widgets.table import Table
from tests.tui.screen import notices

HIGH = {"rule": "kl_high", "text": "objective/kl is 7.26, above 6", "count": 1}


@pytest.fixture
def training(session_maker, tmp_path):
    """A session of 60 steps with an alert, and the journal of its engine."""
    session = session_maker(tmp_path / "sessions", "frozen", 60)
    lock = session.acquire()
    session.write_engine(str(tmp_path / "no.sock"), "1")
    with contextlib.closing(JournalWriter(session)) as journal:
        journal.record_event("alert", HIGH, 50)
        journal.begin_attempt(60, fresh=False)
        journal.set_meta(state="running")
        yield session, journal
    lock.release()


@contextlib.asynccontextmanager
async def reading_samples(session, running, until):
    """The app on the screen of responses, once it has read the session."""
    app = RlhfApp(session.folder.parent, session.name)
    async with running(app) as pilot:
        await pilot.press("3")
        await until(pilot, lambda: app.screen.query_one(Table).count() > 0 and app.state.live)
        yield app, pilot


async def test_an_alert_is_announced_once_on_another_screen(training, running, until):
    session, journal = training
    async with reading_samples(session, running, until) as (app, pilot):
        assert notices(app) == [], "the earlier alert is not new"
        journal.record_event("alert", HIGH | {"count": 2}, 60)
        await until(pilot, lambda: notices(app) == ["! step 60: kl_high: KL 7.26 > 6"])
        journal.record_event("note", {"text": "seen", "who": "ana"}, 60)
        await until(pilot, lambda: app.state.timeline.events[-1].kind == "note")
        assert notices(app) == ["! step 60: kl_high: KL 7.26 > 6"]


async def test_a_failure_is_announced_without_the_notice_that_repeats_it(training, running, until):
    session, journal = training
    async with reading_samples(session, running, until) as (app, pilot):
        journal.record_event("error", {"text": "rank 0 was ended by SIGKILL"}, 60)
        notice = {"rule": "restart", "text": "rank 0 was ended by SIGKILL: restart 1 of 3"}
        journal.record_event("alert", notice, 60)
        journal.begin_attempt(50, fresh=False)  # everything is read again: steps are abandoned
        await until(pilot, lambda: notices(app) == ["✗ step 60: rank 0 was ended by SIGKILL"])
        await until(pilot, lambda: len(app.state.head.attempts) == 3)
        assert notices(app) == ["✗ step 60: rank 0 was ended by SIGKILL"]


async def test_of_many_alerts_at_once_the_newest_are_announced(training, running, until):
    session, _ = training
    async with reading_samples(session, running, until) as (app, pilot):
        events = [
            EventRow(
                event=1000 + i, attempt=2, step=60, time=time.time(), kind="alert",
                payload=AlertEvent(rule=f"rule-{i}", text="high"),
            )
            for i in range(10)
        ]  # fmt: skip
        app.post_message(SessionUpdated(str(session.folder), SessionUpdate(events=events)))
        newest = [f"! step 60: rule-{i}: high" for i in range(10 - MAX_ANNOUNCED, 10)]
        await until(pilot, lambda: notices(app) == newest)
