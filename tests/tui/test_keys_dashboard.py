"""The dashboard's keys, pressed on a frozen session."""

from itertools import pairwise

import pytest

from engine.journal.reader import JournalReader
from rlhf_tui.dialogs.picker import PickerDialog
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.charts.grid import ChartGrid
from rlhf_tui.widgets.panels.timeline import TimelinePanel
from rlhf_tui.widgets.table import Table
from tests.tui.screen import notices, press_for


async def test_the_crosshair_moves(run_app):
    async with run_app() as (app, pilot):
        for keys, cursor in (
            ("left", 200), ("h", 200), ("right", 200), ("l", 200), ("g", 1), ("home", 1),
            ("G", 200), ("end", 200), ("n", 200), ("N N", 150), ("g n", 50),
        ):  # fmt: skip
            await pilot.press(*keys.split())
            assert app.view.cursor == cursor, keys
            await pilot.press("escape")
            assert app.view.cursor is None


async def test_blanks_between_the_dots_of_a_curve_are_drawn_with_them(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("l")
        lines = [
            list(chart.render_line(y))
            for chart in app.screen.query(Chart)
            for y in range(chart.size.height)
        ]
    assert any(segment.style.reverse for line in lines for segment in line)  # an alert
    pairs = [pair for line in lines for pair in pairwise(line)]
    for before, after in pairs:
        same_paper = before.style.bgcolor == after.style.bgcolor
        if same_paper and not before.style.reverse:
            assert not after.text.isspace(), (before, after)
    # The paper of a reversed style is its colour: a blank beside it is not drawn with it.
    assert not [b for b, _ in pairs if b.style.reverse and b.text.endswith(" ")]


async def test_left_and_right_move_by_a_cell_and_with_shift_by_ten(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("g", "right")
        one = app.view.cursor - 1
        await pilot.press("g", "shift+right")
        assert one >= 1
        assert app.view.cursor - 1 >= 8 * one
        await pilot.press("shift+left")
        assert app.view.cursor == 1


async def test_all_charts_share_the_crosshair(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("g", "right", "right")
        columns = {
            row.index("│")
            for chart in app.screen.query(Chart)
            for row in [chart.text().splitlines()[2]]
            if "│" in row
        }
        assert len(columns) == 1


async def test_a_click_puts_the_crosshair_there(run_app):
    async with run_app() as (app, pilot):
        await pilot.click(Chart, offset=(20, 5))
        assert 1 < app.view.cursor < 200


async def test_j_and_k_choose_a_chart(run_app):
    async with run_app() as (app, pilot):
        grid = app.screen.query_one(ChartGrid)
        for key, at in (("j", 1), ("down", 2), ("k", 1), ("up", 0), ("k", 3)):
            await pilot.press(key)
            assert grid.charts.index(grid.current) == at
            assert grid.current.has_focus


async def test_tab_leaves_the_charts_and_returns_to_the_one_that_had_the_focus(run_app):
    async with run_app() as (app, pilot):
        charts = app.screen.query_one(ChartGrid).charts
        for key in ("tab", "shift+tab"):
            await pilot.press("j")
            assert app.focused in charts
            left = app.focused
            await pilot.press(key)
            assert app.focused not in charts
            await pilot.press("tab" if key == "shift+tab" else "shift+tab")
            assert app.focused is left


async def test_plus_minus_comma_stop_and_zero_choose_the_window(run_app):
    async with run_app() as (app, pilot):
        whole = app.view.window(app.state)
        await pilot.press("plus")
        near = app.view.window(app.state)
        assert near[1] - near[0] < whole[1] - whole[0]
        await pilot.press("equals_sign", "comma")
        earlier = app.view.window(app.state)
        assert earlier[1] < near[1]
        await pilot.press("full_stop")
        assert app.view.window(app.state)[1] > earlier[1]
        await pilot.press("minus", "0")
        assert app.view.window(app.state) == whole


@pytest.mark.parametrize("key", ["z", "enter"])
async def test_a_chart_is_enlarged_and_esc_takes_it_back(run_app, key, until):
    async with run_app() as (app, pilot):
        await pilot.press("j", key)
        await until(pilot, lambda: sum(c.display for c in app.screen.query(Chart)) == 1)
        await pilot.press("escape")
        await until(pilot, lambda: sum(c.display for c in app.screen.query(Chart)) == 4)


async def test_esc_goes_out_one_level_at_a_time(run_app):
    async with run_app() as (app, pilot):
        await pilot.press("plus", "g", "escape")
        assert app.view.cursor is None
        assert app.view.width is not None
        await pilot.press("escape")
        assert app.view.width is None


async def test_metrics_are_picked_and_remembered(make_app, running, until):
    app = make_app()
    async with running(app) as pilot:
        await press_for(pilot, PickerDialog, "m")
        await pilot.press(*"grad_norm", "tab", "enter")
        await until(pilot, lambda: len(app.screen.query(Chart)) == 5)
        assert app.preferences.charts[-1] == "grad_norm"
        await until(pilot, lambda: len(make_app().preferences.charts) == 5, "the file")


async def test_the_picker_shows_the_newest_values_of_metrics_without_a_chart_too(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, PickerDialog, "m")
        assert not app.state.curves.is_read("grad_norm")
        await pilot.press(*"grad")
        await until(pilot, lambda: all(option.value for option in app.screen.options))
        shown = {option.key: option.value for option in app.screen.options}
        with JournalReader(app.session) as reader:
            _, newest = reader.metrics.newest_value("grad_norm")
        assert float(shown["grad_norm"]) == pytest.approx(newest, 0.01)
        assert shown["grad_norm"] in app.screen.query_one(Table).text()


async def test_two_metrics_are_put_on_one_chart_by_keyboard(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, PickerDialog, "m")
        await pilot.press(*"grad_norm", "shift+tab", "enter")
        await until(pilot, lambda: len(app.screen.query_one(ChartGrid).charts[3].names) == 2)
        assert app.preferences.charts[-1] == "objective/kl_coef + grad_norm"
        chart = app.screen.query_one(ChartGrid).charts[3]
        await until(pilot, lambda: "beta + gradient norm" in chart.text().splitlines()[0])
        assert "·" in chart.text().splitlines()[0], "one of the values is missing"


async def test_what_shares_a_chart_can_be_taken_out_of_it(make_app, running, until):
    app = make_app()
    app.preferences.charts = ["objective/scores + objective/kl", "grad_norm"]
    async with running(app) as pilot:
        await press_for(pilot, PickerDialog, "m")
        assert app.screen.marked == [["objective/scores", "objective/kl"], ["grad_norm"]]
        await pilot.press(*"scores", "tab", "enter")
        await until(pilot, lambda: not isinstance(app.screen, PickerDialog))
        assert app.preferences.charts == ["objective/kl", "grad_norm"]


async def test_d_changes_how_many_charts_stand_side_by_side(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: app.screen.query_one(ChartGrid).styles.grid_size_columns == 1)
        await pilot.press("d", "d")
        await until(pilot, lambda: app.screen.query_one(ChartGrid).styles.grid_size_columns == 3)


async def test_L_makes_the_focused_chart_logarithmic(run_app):  # noqa: N802 - the key's name
    async with run_app() as (app, pilot):
        await pilot.press("j", "L")
        chart = app.screen.query_one(ChartGrid).charts[1]
        assert chart.log_scale
        assert "log" in chart.text().splitlines()[0]
        assert app.preferences.log == ["objective/kl"]


async def test_s_changes_the_smoothing(run_app):
    async with run_app() as (app, pilot):
        weights = [app.view.weight]
        for _ in range(4):
            await pilot.press("s")
            weights.append(app.view.weight)
        assert weights[0] == weights[-1]
        assert len(set(weights)) == 4


async def test_o_hides_earlier_attempts(run_app):
    async with run_app() as (app, pilot):
        assert any(line.style == "past" for c in app.screen.query(Chart) for line in c.plot().lines)
        await pilot.press("o")
        assert not any(
            line.style == "past" for c in app.screen.query(Chart) for line in c.plot().lines
        )


async def test_another_session_s_curves_are_laid_beside(run_app, tmp_path, session_maker, until):
    session_maker(tmp_path / "two", "frozen")
    session_maker(tmp_path / "two", "other", 30)
    async with run_app(root=tmp_path / "two") as (app, pilot):
        await press_for(pilot, PickerDialog, "O")
        await pilot.press("enter")
        await until(pilot, lambda: "other" in app.view.others)
        chart = app.screen.query_one(ChartGrid).charts[0]
        title, *plot = chart.text().splitlines()
        assert "a other" in title
        assert any("a" in line for line in plot), "no curve ends in the letter of the legend"
        assert "a other" in app.screen.query_one("#cursor").text()


async def test_v_turns_the_panels_of_a_narrow_terminal(run_app):
    async with run_app(size=(80, 24)) as (app, pilot):
        shown = []
        for _ in range(3):
            await pilot.pause()
            shown.append(
                {
                    i
                    for i in ("timeline", "latest", "machine")
                    if app.screen.query_one(f"#{i}").display
                }
            )
            await pilot.press("v")
        assert shown == [{"timeline"}, {"latest"}, {"machine"}]


async def test_v_says_that_a_wide_terminal_shows_all_panels(run_app, until):
    async with run_app(size=(120, 40)) as (app, pilot):
        await pilot.press("v")
        await until(pilot, lambda: notices(app) == ["all panels are shown already"])


async def test_the_title_of_what_has_the_focus_is_marked_although_the_run_stands_still(
    run_app, until
):
    async with run_app() as (app, pilot):
        timeline = app.screen.query_one(TimelinePanel)

        def titles():
            charts = [chart.text().splitlines()[0] for chart in app.screen.query(Chart)]
            return [*charts, timeline.render_line(0).text]

        for key, place in (("j", 1), ("j", 2), ("tab", 4), ("shift+tab", 2)):
            await pilot.press(key)
            expected = [i == place for i in range(5)]
            await until(pilot, lambda e=expected: [t.startswith("▸") for t in titles()] == e, key)
