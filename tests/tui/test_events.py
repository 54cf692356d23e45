"""The events of the dashboard: reached with n and N, opened with enter, selected by mouse."""

import pytest

from engine.journal.rows import EventRow, NoteEvent
from engine.journal.writer import JournalWriter
from engine.session.folder import create
from rlhf_tui.dialogs.event import EventDialog
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.widgets.panels.cursor import CursorPanel
from rlhf_tui.widgets.panels.timeline import TimelinePanel
from rlhf_tui.widgets.scroll_list import ScrollText
from tests.tui.conftest import NOW, config_of, freeze

LONG = "objective/kl is 9.5, above 2 × target (4) " + "and so on " * 30 + "to the end"


@pytest.fixture
def alerts(session_maker, tmp_path):
    """A session with two alerts at one step, each with a response of its own."""
    session = session_maker(tmp_path / "sessions", "alerts", 5)
    journal = JournalWriter(session)
    for rule, response in (("first", "all good things"), ("second", "the very worst")):
        sample = {"index": 3, "prompt": "p", "response": response, "score": 1.0, "kl": 9.5}
        data = {"rule": rule, "text": LONG, "action": "notify", "samples": [sample]}
        journal.record_event("alert", data, 4)
    journal.close()
    freeze(session)
    return session


@pytest.fixture
def alerts_app(make_app, alerts):
    return make_app("alerts", root=alerts.folder.parent)


async def opened(pilot, app, until):
    """The text of the event that was opened."""
    await until(pilot, lambda: isinstance(app.screen, EventDialog))
    await until(pilot, lambda: app.screen.query_one(ScrollText).size.width > 0)
    return " ".join(app.screen.query_one(ScrollText).text().split())


async def test_n_reaches_every_alert_of_a_step_each_with_its_samples(alerts_app, running, until):
    app = alerts_app
    async with running(app) as pilot:
        await pilot.press("g", "n", "enter")
        first = await opened(pilot, app, until)
        assert "all good things" in first
        assert "the very worst" not in first
        await pilot.press("n")
        await until(pilot, lambda: "second" in app.screen.lines()[0][0][0])
        assert "the very worst" in await opened(pilot, app, until)
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert "2 of 2" in app.screen.query_one(CursorPanel).text()


async def test_what_paused_a_run_before_its_first_step_is_opened_with_n_and_said_once(
    run_app, tmp_path, until
):
    session = create(tmp_path / "early", "early", config_of())
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    text = "the reward function raised ValueError: no such word"
    journal.record_event("alert", {"rule": "reward", "text": text, "action": "pause"}, 0)
    journal.set_meta(state="stopped")
    journal.close()
    freeze(session)
    async with run_app("early", root=tmp_path / "early") as (app, pilot):
        await until(pilot, lambda: app.screen.query_one(TimelinePanel).count() == 2)
        await pilot.press("n", "enter")
        assert (await opened(pilot, app, until)).count(text) == 1


async def test_an_alert_is_whole_when_it_is_opened(alerts_app, running, until):
    app = alerts_app
    async with running(app, (80, 24)) as pilot:
        await pilot.press("g", "n", "enter")
        assert "to the end" in await opened(pilot, app, until)


async def test_enter_without_an_event_still_enlarges_the_chart(alerts_app, running):
    app = alerts_app
    async with running(app) as pilot:
        await pilot.press("n", "escape", "enter")
        assert len(app.screen_stack) == 1
        assert app.screen.grid.enlarged


async def test_a_click_selects_an_event_and_a_second_one_opens_it(alerts_app, running, until):
    app = alerts_app
    async with running(app) as pilot:
        lines = app.screen.query_one(TimelinePanel).text().splitlines()
        y = next(i for i, line in enumerate(lines) if "first" in line)
        await pilot.click("#timeline", offset=(10, y))
        assert app.view.cursor == 4
        await pilot.click("#timeline", offset=(10, y))
        assert "all good things" in await opened(pilot, app, until)


async def test_the_timeline_is_moved_through_by_time_with_the_keys_of_a_list(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("tab")
        assert app.screen.query_one(TimelinePanel).text().startswith("▸What happened")
        await pilot.press("j")
        newest = app.view.marker(app.state)
        await pilot.press("G")
        assert newest == app.state.timeline.entries()[-1]
        assert app.view.marker(app.state) == app.state.timeline.entries()[0]


async def test_enter_in_the_timeline_opens_the_newest_event_if_none_is_selected(
    alerts_app, running, until
):
    app = alerts_app
    async with running(app) as pilot:
        await pilot.press("tab", "enter")
        await until(pilot, lambda: isinstance(app.screen, EventDialog))
        assert app.view.marker(app.state) == app.state.timeline.entries()[-1]


async def test_newer_events_are_counted_while_one_stays_selected(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("tab", "j")
        timeline, selected = app.screen.query_one(TimelinePanel), app.view.marker(app.state)
        assert "newer" not in timeline.text()
        notes = [
            EventRow(
                event=1000 + number, time=NOW, attempt=2, step=200, kind="note",
                payload=NoteEvent(text=f"note {number}", who="ana"),
            )
            for number in range(40)
        ]  # fmt: skip
        app.state.take(SessionUpdate(events=notes))
        timeline.update()
        first = timeline.render_line(1).text
        assert app.view.marker(app.state) == selected
        shown = int(first.split("note ")[1].split()[0])
        assert f"  {39 - shown} newer ↑" in timeline.render_line(0).text
        await pilot.press("g")
        assert "newer" not in timeline.render_line(0).text


async def test_an_alert_of_another_version_is_shown_without_its_samples(alerts, run_app, until):
    journal = JournalWriter(alerts)
    journal.record_event("alert", {"rule": "new", "text": "odd", "samples": {"x": 1}}, 5)
    journal.close()
    async with run_app("alerts", root=alerts.folder.parent) as (app, pilot):
        await pilot.press("n", "enter")
        assert "new: odd" in await opened(pilot, app, until)


async def test_the_list_of_sessions_says_what_paused_one(alerts, run_app, engine, until):
    journal = JournalWriter(alerts)
    journal.set_meta(state="paused", pause_reason="kl_high at step 4: KL 9.5 > 8")
    journal.close()
    async with run_app(None, root=alerts.folder.parent) as (app, pilot):
        about = app.screen.query_one("#about")
        await until(pilot, lambda: "paused by kl_high at step 4: KL 9.5 > 8" in about.text())
