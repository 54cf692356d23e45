"""The list of samples on a live run: it stays under its reader, who is told what is new."""

import contextlib
import random
import sqlite3
import threading

import pytest

from engine.journal.samples import SampleReader
from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import StepReport
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.dialogs.probes import ProbePicker
from rlhf_tui.dialogs.text import ProbeDialog
from rlhf_tui.screens.parts.sample_list import PAGE_SIZE
from rlhf_tui.widgets.samples.judgement import key_of
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.scroll_list import ScrollText, thumb
from rlhf_tui.widgets.table import Table
from tests.judging import STEPS, judgements
from tests.tui.conftest import sample_of
from tests.tui.screen import notices, press_for
from tests.tui.test_comparing import beside, pairs, reference
from tests.variants import some_of


def train(session, last, first=STEPS + 1, score=9.0):
    """Further steps, whose eight responses have the best scores there are."""
    rng = random.Random(3)  # noqa: S311 - no secret
    journal = JournalWriter(session)
    for step in range(first, last + 1):
        samples = [sample_of(i, rng, arrays=False, score=score) for i in range(8)]
        journal.record_step(StepReport(step=step, metrics={}, samples=samples, settings={}))
    journal.close()


def line(app):
    return app.screen.query_one("#filter").text()


def selected(app):
    """The response that a key would judge, which must be the one in the pane."""
    assert settled(app)
    return key_of(app.screen.selected())


def settled(app):
    """Whether the pane shows the response under the cursor."""
    return key_of(app.screen.query_one(SampleView).sample) == key_of(app.screen.selected())


async def test_a_search_that_takes_longer_than_a_step_is_shown_then_the_new_step(
    samples, judged, until, monkeypatch
):
    async with samples(follow=True) as (app, pilot):
        table, page = app.screen.query_one(Table), SampleReader.page
        begun, first, later = [], threading.Event(), threading.Event()

        def slowly(*args, **named):  # as in a run of 100,000 steps
            begun.append(1)
            assert (first if len(begun) == 1 else later).wait(60)
            return page(*args, **named)

        monkeypatch.setattr(SampleReader, "page", slowly)
        try:
            await press_for(pilot, InputDialog, "slash")
            await pilot.press(*"kl>7", "enter")
            await until(pilot, lambda: begun)
            train(judged, STEPS + 1)
            await until(pilot, lambda: app.state.head.step == STEPS + 1)
            app.screen.draw()
            first.set()
            await until(pilot, lambda: 0 < table.count() < 8 * STEPS)
            later.set()
            await until(pilot, lambda: table.keys[0][1] == STEPS + 1)
        finally:
            first.set()
            later.set()


KEYS = {keys: keys.split() for keys in ("j", "s j", "d", "z", "v", "enter", "plus")}


@pytest.mark.parametrize("keys", some_of(KEYS, "s j", "d", "plus"))
async def test_what_the_run_records_moves_nothing_under_a_reader(samples, judged, keys, until):
    async with samples(follow=True) as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press(*keys)
        await until(pilot, lambda: table.sorted_by == ("score" if "s" in keys else "step"))
        await until(pilot, lambda: settled(app))
        before, listed = selected(app), table.keys
        train(judged, STEPS + 2)
        await until(pilot, lambda: "16 new  F show" in line(app), "the count")
        await pilot.press("minus")
        train(judged, STEPS + 3, first=STEPS + 3)
        await until(pilot, lambda: "24 new  F show" in line(app), "the count")
        await pilot.press("exclamation_mark")
        wanted = {before[1:]: ("hack", None)}
        await until(pilot, lambda: judgements(judged) == wanted)
        await until(pilot, lambda: not app.screen.labels.unwritten)
        await pilot.pause(0.5)  # what the written judgement has read again would be shown by now
        assert (selected(app), table.keys) == (before, listed)


async def test_of_what_is_new_only_the_last_steps_are_counted(samples, judged, until, monkeypatch):
    counted, count_after = [], SampleReader.count_after

    def count(reader, query, step, last_step):
        counted.append((step, last_step))
        return count_after(reader, query, step, last_step)

    monkeypatch.setattr(SampleReader, "count_after", count)
    async with samples(follow=True) as (app, pilot):
        await pilot.press("j")
        await until(pilot, lambda: settled(app))
        for last in range(STEPS + 1, STEPS + 4):
            train(judged, last, first=last)
            await until(pilot, lambda new=8 * (last - STEPS): f"{new} new" in line(app))
    assert set(counted) == {(STEPS + n, STEPS + n + 1) for n in range(3)}


async def test_f_shows_what_is_new_and_follows_the_run(samples, judged, until):
    async with samples(follow=True) as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press("j")
        train(judged, STEPS + 1)
        await until(pilot, lambda: "8 new" in line(app))
        await pilot.press("F")
        await until(pilot, lambda: table.keys[0][1] == STEPS + 1)
        assert "new" not in line(app)
        assert f"row 1/{8 * STEPS + 8}" in line(app)
        train(judged, STEPS + 2, first=STEPS + 2)
        await until(pilot, lambda: table.keys[0][1] == STEPS + 2)
        await until(pilot, lambda: app.screen.selected().step == STEPS + 2)


async def test_f_keeps_the_selected_response_in_an_order_that_cannot_be_followed(
    samples, judged, until
):
    async with samples(follow=True) as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press("s")
        await until(pilot, lambda: table.sorted_by == "score")
        await pilot.press("g", "j")
        await until(pilot, lambda: settled(app))
        assert selected(app) == table.keys[1]
        before = selected(app)
        train(judged, STEPS + 1)
        await until(pilot, lambda: "8 new" in line(app))
        await pilot.press("F")
        await until(pilot, lambda: table.count() == 8 * STEPS + 8)
        assert selected(app) == before
        assert table.cursor == 9


async def test_a_response_that_came_by_itself_is_not_judged_by_the_first_key(
    samples, judged, until
):
    async with samples(follow=True) as (app, pilot):
        train(judged, STEPS + 1)
        await until(pilot, lambda: app.screen.selected().step == STEPS + 1, "the new response")
        await pilot.press("plus")
        assert "press again to judge it" in app.screen.query_one("#keys").text()
        assert not app.screen.labels.unwritten
        await pilot.press("plus")
        wanted = {(STEPS + 1, 0): ("good", None)}
        await until(pilot, lambda: judgements(judged) == wanted)


async def test_after_a_roll_back_a_reader_judges_what_is_in_the_pane(samples, judged, until):
    async with samples(follow=True) as (app, pilot):
        await pilot.press("j")
        await until(pilot, lambda: app.screen.query_one(SampleView).sample.index == 1)
        before = selected(app)
        journal = JournalWriter(judged)
        journal.begin_attempt(3, fresh=True)
        journal.close()
        train(judged, STEPS, first=4)
        await until(pilot, lambda: "24 new" in line(app))
        await pilot.press("minus")
        await until(pilot, lambda: judgements(judged) == {before[1:]: ("bad", None)})
        assert selected(app) == before
        await pilot.press("F")
        await until(pilot, lambda: app.screen.selected().attempt > before[0])
        assert app.screen.selected().label is None


async def test_pages_of_a_live_run_neither_repeat_nor_skip_a_response(
    session_maker, tmp_path, run_app, until
):
    session = session_maker(tmp_path / "sessions", "long", 100)
    async with run_app("long", root=tmp_path / "sessions") as (app, pilot):
        await pilot.press("3")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == PAGE_SIZE)
        first = table.keys
        train(session, 110, first=101)
        await pilot.press("full_stop")
        await until(pilot, lambda: table.count() == 800 - PAGE_SIZE)
        assert not {*first} & {*table.keys}
        assert {step for _, step, _ in (*first, *table.keys)} == {*range(1, 101)}


async def test_a_pair_stays_though_the_reference_was_probed_again(samples, judged, until):
    reference(judged, "first words")
    async with samples(follow=True) as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: beside(app).row is not None)
        with contextlib.closing(sqlite3.connect(judged.journal_file)) as db, db:
            db.execute(
                "UPDATE commands SET applied_step = 5, result = replace(result, 'first', 'other') "
                "WHERE command = 'probe'"
            )
        await pilot.press("y")
        await until(pilot, lambda: pairs(judged))
        await until(pilot, lambda: not app.screen.labels.unwritten)
        await pilot.pause(0.5)  # the others were read again
        assert beside(app).row.response == "first words"
        await pilot.press("o")
        await until(pilot, lambda: pairs(judged)[0][0].response == "first words")


async def test_the_responses_to_one_prompt_are_listed_by_step(samples, judged, until):
    with contextlib.closing(sqlite3.connect(judged.samples_file)) as db, db:
        db.execute("UPDATE samples SET prompt = 'another' WHERE idx = 2")
    async with samples() as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press("s")
        await until(pilot, lambda: table.sorted_by == "score")
        await pilot.press("/", *"another", "enter")
        await until(pilot, lambda: table.count() == STEPS)
        await pilot.press("j", "j", "equals_sign")
        await until(pilot, lambda: table.sorted_by == "step")
        await until(pilot, lambda: settled(app))
        before = selected(app)
        assert [key[1:] for key in table.keys] == [(step, 2) for step in range(1, STEPS + 1)]
        await pilot.press("escape")
        await until(pilot, lambda: table.sorted_by == "score")
        await until(pilot, lambda: settled(app))
        assert "only another" in line(app)
        assert selected(app) == before


async def test_probes_are_found_again_with_their_prompts(samples, judged, until):
    reference(judged)
    async with samples() as (app, pilot):
        await press_for(pilot, ProbePicker, "P")
        await press_for(pilot, ProbeDialog, *"watched", "enter")
        await until(pilot, lambda: app.screen.query_one(ScrollText).size.width > 0)
        shown = app.screen.query_one(ScrollText).text()
        assert "I watched this one with" in shown
        assert "the reference's words" in shown
        await press_for(pilot, ProbePicker, "escape")
        await pilot.press("escape")
        assert len(app.screen_stack) == 1
        assert not notices(app)


async def test_the_prompt_has_a_column_only_where_much_of_it_can_be_read(samples):
    for width, there in ((80, False), (120, False), (160, True)):
        async with samples(size=(width, 24)) as (app, _):
            header = app.screen.query_one(Table).text().splitlines()[0]
            assert ("prompt" in header) is there


@pytest.mark.parametrize(("page", "count"), [(1, 2), (9, 10), (20, 500), (3, 100_000)])
def test_a_scroll_bar_reaches_both_ends_and_never_leaves_them(page, count):
    ends = [thumb(top, page, count) for top in range(count - page + 1)]
    assert ends[0][0] == 0
    assert ends[-1][1] == page
    assert all(0 <= first < last <= page for first, last in ends)
