"""What is clicked: keys of the footer and titles of columns. Tabs, rows and charts have theirs."""

import pytest
from textual import events

from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.dialogs.help import HelpDialog
from rlhf_tui.dialogs.picker import PickerDialog
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.charts.plot import GUTTER
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.table import Table


async def click_key(pilot, app, words):
    x = app.screen.query_one(KeyFooter).text().index(words)
    await pilot.click("#keys", offset=(x + 1, 0))


@pytest.mark.parametrize(
    ("words", "dialog"), [("m metrics", PickerDialog), ("b beta", InputDialog), ("? h", HelpDialog)]
)
async def test_a_click_on_a_key_of_the_footer_presses_it(run_app, engine, until, words, dialog):
    async with run_app() as (app, pilot):
        await click_key(pilot, app, words)
        await until(pilot, lambda: isinstance(app.screen, dialog))


async def test_a_click_between_the_keys_and_help_does_nothing(run_app):
    async with run_app() as (app, pilot):
        line = app.screen.query_one(KeyFooter).text()
        await pilot.click("#keys", offset=(line.index("? help") - 5, 0))
        await pilot.pause()
        assert len(app.screen_stack) == 1


def turn_wheel(chart, kind, *, shift=False):
    """Turns the wheel by one notch over a chart, at its middle."""
    x, y = chart.size.width // 2, 3
    chart.post_message(kind(chart, x, y, 0, 0, 0, shift, meta=False, ctrl=False))


async def test_the_wheel_zooms_a_chart_around_the_step_under_the_mouse(run_app, until):
    async with run_app() as (app, pilot):
        await until(pilot, lambda: app.screen.query(Chart))
        chart = app.screen.query(Chart).first()
        whole = chart.view.window(chart.state)
        for _ in range(4):
            turn_wheel(chart, events.MouseScrollUp)
        width = (whole[1] - whole[0]) / 1.25**4
        await until(pilot, lambda: chart.view.width == pytest.approx(width))
        first, last = chart.view.window(chart.state)
        share = (chart.size.width // 2 - GUTTER) / chart.cells
        before, after = (a + share * (b - a) for a, b in (whole, (first, last)))
        assert after == pytest.approx(before, abs=2)
        turn_wheel(chart, events.MouseScrollUp, shift=True)
        await until(pilot, lambda: chart.view.window(chart.state)[0] < first)
        turn_wheel(chart, events.MouseScrollRight)
        await until(pilot, lambda: chart.view.window(chart.state) == pytest.approx((first, last)))
        for _ in range(4):
            turn_wheel(chart, events.MouseScrollDown)
        await until(pilot, lambda: chart.view.window(chart.state) == whole)


async def test_a_click_on_a_title_sorts_by_it_and_again_reverses(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("3")
        await until(pilot, lambda: app.screen.query_one(Table).count() > 0)
        table = app.screen.query_one(Table)
        for arrow in ("▾", "▴"):
            x = table.text().splitlines()[0].index("score")
            await pilot.click("#samples", offset=(x + 1, 0))
            await until(pilot, lambda a=arrow: f"score{a}" in table.text().splitlines()[0])


async def test_a_click_on_a_title_sorts_the_checkpoints(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("4")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() > 1)
        steps = [step for step, _ in table.keys]
        assert steps == sorted(steps, reverse=True)
        await pilot.click("#checkpoints", offset=(table.text().index("step") + 1, 0))
        await until(pilot, lambda: [step for step, _ in table.keys] == sorted(steps))


async def test_a_click_on_a_title_without_an_order_changes_nothing(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("3")
        await until(pilot, lambda: app.screen.query_one(Table).count() > 0)
        before = app.screen.query_one(Table).text()
        await pilot.click("#samples", offset=(before.index("response"), 0))
        await pilot.pause()
        assert app.screen.query_one(Table).text() == before


async def test_titles_and_s_sort_the_sessions_and_the_cursor_stays_on_its_run(
    session_maker, tmp_path, running, until
):
    root = tmp_path / "sessions"
    for name, steps in (("b", 3), ("c", 2), ("a", 4)):
        session_maker(root, name, steps)
    app = RlhfApp(root, None, follow=False)
    async with running(app) as pilot:
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 3)
        as_listed = table.keys
        table.go(as_listed.index("b"))
        for title, keys in (("name", "abc"), ("name", "cba"), ("step", "abc"), ("step", "cba")):
            await pilot.click("#sessions", offset=(table.text().index(title) + 1, 0))
            await until(pilot, lambda k=keys: table.keys == list(k))
            assert table.key == "b"
        await pilot.press(*"sssss")  # beta, score, KL, active, then as at first
        await until(pilot, lambda: table.sorted_by == "")
        assert table.keys == as_listed
