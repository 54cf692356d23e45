"""Every key, pressed on a frozen session."""

import contextlib

import pytest
from textual.events import Key

from engine.commands import Note
from engine.control import Answer
from engine.session import Session
from engine.settings import Change
from rlhf_tui.screens import steer
from rlhf_tui.screens.dialogs import Ask, Type
from rlhf_tui.screens.help import Help
from rlhf_tui.screens.picker import Pick
from rlhf_tui.widgets.chart import Chart
from rlhf_tui.widgets.charts import ChartGrid
from rlhf_tui.widgets.keys import Keys
from rlhf_tui.widgets.listing import Table
from rlhf_tui.widgets.reading import Reading


@pytest.fixture
def engine(monkeypatch):
    """An engine that accepts and applies everything, and writes down what it was asked."""
    sent = []

    class Fake:
        def __init__(self, session, who):
            self.session = session

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

        def send(self, command, command_id):
            sent.append(command)
            return Answer(id=command_id, status="accepted")

        def wait(self, command_id, timeout):
            result = {}
            if isinstance(sent[-1], steer.Probe):
                result = {
                    n: {"response": f"{n} says", "score": 1.0, "kl": 2.0}
                    for n in ("policy", "reference")
                }
            change = Change(key="beta", old=1, new=2)
            return Answer(
                id=command_id, status="applied", step=201, changes=[change], result=result
            )

    monkeypatch.setattr(steer, "Client", Fake)
    monkeypatch.setattr(Session, "is_live", lambda self: True)
    return sent


# -- screens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "mode"),
    [("1", "sessions"), ("2", "dashboard"), ("3", "samples"), ("4", "checkpoints"), ("5", "log")],
)
async def test_a_digit_goes_to_its_screen(make_desk, key, mode, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("4" if key == "2" else "2", key)
        await until(pilot, lambda: desk.current_mode == mode)


async def test_a_click_on_a_tab_goes_to_its_screen(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.click("#tabs", offset=(28, 0))
        await until(pilot, lambda: desk.current_mode == "samples")


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
async def test_leaving_detaches_and_says_how_to_come_back(
    make_desk, monkeypatch, key, root, running, until
):
    desk = make_desk()
    Session(root / "frozen").write_engine("nowhere", "1")
    monkeypatch.setattr(Session, "is_live", lambda self: True)
    async with running(desk) as pilot:
        await pilot.press(key)
        await until(pilot, lambda: desk.farewell)
    assert "still running; reattach with rlhf-tui attach frozen" in desk.farewell
    Session(root / "frozen").engine_file.unlink()


async def test_leaving_a_finished_session_says_nothing(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("q")
    assert desk.farewell == ""


async def test_help_lists_every_binding_that_has_words(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(desk.screen, Help))
        text = "\n".join("".join(p for p, _ in row) for row in desk.screen._lines)
        for words in ("pause", "beta +10 %", "crosshair left", "next marker", "detach", "probe"):
            assert words in text
        await pilot.press("escape")
        await until(pilot, lambda: desk.current_mode == "dashboard" and len(desk.screen_stack) == 1)


async def test_the_palette_has_every_command(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        titles = {c.title for c in desk.get_system_commands(desk.screen)}
        assert {"Pause", "Beta", "Checkpoint", "Metrics", "Zoom in", "Theme: light"} <= titles
        await pilot.press("ctrl+p")
        await until(pilot, lambda: len(desk.screen_stack) == 2)


async def test_t_changes_the_theme(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        seen = {desk.theme}
        for _ in range(2):
            await pilot.press("t")
            seen.add(desk.theme)
        assert seen == {"dark", "light", "contrast"}


# -- the dashboard ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "cursor"),
    [
        (["left"], 200), (["h"], 200), (["right"], 200), (["l"], 200), (["g"], 1), (["home"], 1),
        (["G"], 200), (["end"], 200), (["n"], 200), (["N", "N"], 150), (["g", "n"], 50),
    ],
)  # fmt: skip
async def test_the_crosshair_moves(make_desk, keys, cursor, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press(*keys)
        assert desk.view.cursor == cursor


async def test_left_and_right_move_by_a_cell_and_with_shift_by_ten(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("g", "right")
        one = desk.view.cursor - 1
        await pilot.press("g", "shift+right")
        assert one >= 1
        assert desk.view.cursor - 1 >= 8 * one
        await pilot.press("shift+left")
        assert desk.view.cursor == 1


async def test_all_charts_share_the_crosshair(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("g", "right", "right")
        columns = {
            row.index("│")
            for chart in desk.screen.query(Chart)
            for row in [chart._picture.row_text(2)]
            if "│" in row
        }
        assert len(columns) == 1


async def test_a_click_puts_the_crosshair_there(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.click(Chart, offset=(20, 5))
        assert 1 < desk.view.cursor < 200


async def test_j_and_k_choose_a_chart(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        grid = desk.screen.query_one(ChartGrid)
        for key, at in (("j", 1), ("down", 2), ("k", 1), ("up", 0), ("k", 3)):
            await pilot.press(key)
            assert grid.charts.index(grid.current) == at
            assert grid.current.has_focus


async def test_tab_goes_from_chart_to_chart(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("tab")
        assert desk.screen.query_one(ChartGrid).charts[1].has_focus
        await pilot.press("shift+tab")
        assert desk.screen.query_one(ChartGrid).charts[0].has_focus


async def test_plus_minus_comma_stop_and_zero_choose_the_window(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        whole = desk.view.window(desk.book)
        await pilot.press("plus")
        near = desk.view.window(desk.book)
        assert near[1] - near[0] < whole[1] - whole[0]
        await pilot.press("equals_sign", "comma")
        earlier = desk.view.window(desk.book)
        assert earlier[1] < near[1]
        await pilot.press("full_stop")
        assert desk.view.window(desk.book)[1] > earlier[1]
        await pilot.press("minus", "0")
        assert desk.view.window(desk.book) == whole


@pytest.mark.parametrize("key", ["z", "enter"])
async def test_a_chart_is_enlarged_and_esc_takes_it_back(make_desk, key, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("j", key)
        await until(pilot, lambda: sum(c.display for c in desk.screen.query(Chart)) == 1)
        await pilot.press("escape")
        await until(pilot, lambda: sum(c.display for c in desk.screen.query(Chart)) == 4)


async def test_esc_goes_out_one_level_at_a_time(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("plus", "g", "escape")
        assert desk.view.cursor is None
        assert desk.view.width is not None
        await pilot.press("escape")
        assert desk.view.width is None


async def test_metrics_are_picked_and_remembered(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("m")
        await until(pilot, lambda: isinstance(desk.screen, Pick))
        await pilot.press(*"grad_norm", "tab", "enter")
        await until(pilot, lambda: len(desk.screen.query(Chart)) == 5)
        assert desk.preferences.charts[-1] == "grad_norm"
        await until(pilot, lambda: len(make_desk().preferences.charts) == 5, "the file")


async def test_two_metrics_are_put_on_one_chart_by_keyboard(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("m")
        await until(pilot, lambda: isinstance(desk.screen, Pick))
        await pilot.press(*"grad_norm", "shift+tab", "enter")
        await until(pilot, lambda: len(desk.screen.query_one(ChartGrid).charts[3].names) == 2)
        assert desk.preferences.charts[-1] == "objective/kl_coef + grad_norm"
        chart = desk.screen.query_one(ChartGrid).charts[3]
        await until(pilot, lambda: "beta + gradient norm" in chart._picture.row_text(0))
        assert "·" in chart._picture.row_text(0), "one of the values is missing"


async def test_what_shares_a_chart_can_be_taken_out_of_it(make_desk, running, until):
    desk = make_desk()
    desk.preferences.charts = ["objective/scores + objective/kl", "grad_norm"]
    async with running(desk) as pilot:
        await pilot.press("m")
        await until(pilot, lambda: isinstance(desk.screen, Pick))
        assert desk.screen.marked == [["objective/scores", "objective/kl"], ["grad_norm"]]
        await pilot.press(*"scores", "tab", "enter")
        await until(pilot, lambda: not isinstance(desk.screen, Pick))
        assert desk.preferences.charts == ["objective/kl", "grad_norm"]


async def test_d_changes_how_many_charts_stand_side_by_side(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("d")
        await until(pilot, lambda: desk.screen.query_one(ChartGrid).styles.grid_size_columns == 1)
        await pilot.press("d", "d")
        await until(pilot, lambda: desk.screen.query_one(ChartGrid).styles.grid_size_columns == 3)


async def test_L_makes_the_focused_chart_logarithmic(make_desk, running):  # noqa: N802 - the key's name
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("j", "L")
        chart = desk.screen.query_one(ChartGrid).charts[1]
        assert chart.log_scale
        assert "log" in chart._picture.row_text(0)
        assert desk.preferences.log == ["objective/kl"]


async def test_s_changes_the_smoothing(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        weights = [desk.view.weight]
        for _ in range(4):
            await pilot.press("s")
            weights.append(desk.view.weight)
        assert weights[0] == weights[-1]
        assert len(set(weights)) == 4


async def test_o_hides_earlier_attempts(make_desk, running):
    desk = make_desk()
    async with running(desk) as pilot:
        assert any(
            line.style == "past" for c in desk.screen.query(Chart) for line in c._plot().lines
        )
        await pilot.press("o")
        assert not any(
            line.style == "past" for c in desk.screen.query(Chart) for line in c._plot().lines
        )


async def test_another_session_s_curves_are_laid_beside(
    make_desk, tmp_path, session_maker, running, until
):
    session_maker(tmp_path / "two", "frozen")
    session_maker(tmp_path / "two", "other", 30)
    desk = make_desk(root=tmp_path / "two")
    async with running(desk) as pilot:
        await pilot.press("O")
        await until(pilot, lambda: isinstance(desk.screen, Pick))
        await pilot.press("enter")
        await until(pilot, lambda: "other" in desk.view.others)


async def test_v_turns_the_panels_of_a_narrow_terminal(make_desk, running):
    desk = make_desk()
    async with running(desk, (80, 24)) as pilot:
        shown = []
        for _ in range(3):
            await pilot.pause()
            shown.append(
                {
                    i
                    for i in ("ledger", "newest", "machine")
                    if desk.screen.query_one(f"#{i}").display
                }
            )
            await pilot.press("v")
        assert shown == [{"ledger"}, {"newest"}, {"machine"}]


# -- steering -----------------------------------------------------------------------------------


async def test_p_pauses(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("p")
        await until(pilot, lambda: engine == [steer.Pause()])


@pytest.mark.parametrize(
    ("key", "value"), [("right_square_bracket", 0.088), ("left_square_bracket", 0.07273)]
)
async def test_brackets_nudge_beta_by_a_tenth(make_desk, engine, key, value, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press(key)
        await until(pilot, lambda: engine == [steer.Beta(value=value)])


async def test_b_asks_for_beta_and_shows_old_and_new(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("b")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"0.12")
        outlook = desk.screen.query_one("#outlook")
        await until(pilot, lambda: "0.08 → 0.12" in outlook._rows[0][0][0])
        await pilot.press("enter")
        await until(pilot, lambda: engine == [steer.Beta(value=0.12)])


async def test_a_wrong_value_is_not_sent_and_the_dialog_says_why(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("b")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"-3", "enter")
        assert isinstance(desk.screen, Type)
        assert desk.screen.query_one("#outlook")._rows[0][0][1] == "warn"
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(desk.screen, Type))
    assert engine == []


async def test_a_hands_beta_over_and_takes_it_back(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("a")
        await until(pilot, lambda: engine == [steer.Control(controller="fixed")])


@pytest.mark.parametrize(("key", "command"), [("u", steer.Undo()), ("c", steer.Checkpoint())])
async def test_undo_and_checkpoint_are_one_key(make_desk, engine, key, command, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press(key)
        await until(pilot, lambda: engine == [command])


async def test_e_sets_any_setting(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("e")
        await until(pilot, lambda: isinstance(desk.screen, Pick))
        await pilot.press(*"learning", "enter")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"1e-4", "enter")
        await until(pilot, lambda: engine == [steer.Set(key="learning_rate", value=1e-4)])


@pytest.mark.parametrize(
    ("keys", "sent"),
    [(["enter"], [steer.Stop()]), (["n"], [steer.Stop(now=True)]), (["escape"], []), (["c"], []),
     (["right", "right", "enter"], [])],
)  # fmt: skip
async def test_stop_asks_and_the_safe_answer_has_the_focus(
    make_desk, engine, keys, sent, running, until
):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("S")
        await until(pilot, lambda: isinstance(desk.screen, Ask))
        await pilot.press(*keys)
        await until(pilot, lambda: not isinstance(desk.screen, Ask))
        await until(pilot, lambda: engine == sent)


async def test_w_writes_a_note(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("w")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"odd", "enter")
        await until(pilot, lambda: engine == [steer.Note(text="odd")])


async def test_x_probes_and_shows_both_answers(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("x")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: isinstance(desk.screen, Ask), "the answers")
        text = str([p for row in desk.screen.rows for p, _ in row])
        assert "policy says" in text
        assert "reference says" in text


@pytest.mark.parametrize(
    "key", ["p", "b", "a", "u", "c", "e", "S", "w", "x", "right_square_bracket"]
)
async def test_read_only_has_no_commands(make_desk, engine, key, running):
    desk = make_desk(read_only=True)
    async with running(desk) as pilot:
        await pilot.press(key)
        await pilot.pause()
        assert len(desk.screen_stack) == 1
        assert engine == []
        actions = {b.binding.action for b in desk.screen.active_bindings.values()}
        assert not actions & set(steer.ACTIONS)


async def test_without_an_engine_a_command_names_what_starts_one(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("p")
        await until(pilot, lambda: desk._notifications)
        assert "rlhf-tui resume frozen" in str([n.message for n in desk._notifications])


async def test_a_command_s_life_is_told(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("c")
        keys = desk.screen.query_one(Keys)
        await until(pilot, lambda: "applied at step 201" in keys._notice)


# -- samples ------------------------------------------------------------------------------------


@pytest.fixture
def samples(make_desk, running, until):
    @contextlib.asynccontextmanager
    async def open_samples():
        desk = make_desk()
        async with running(desk) as pilot:
            await pilot.press("3")
            await until(pilot, lambda: desk.screen.query_one(Table).count() == 500, "the table")
            yield desk, pilot

    return open_samples


async def test_the_answer_under_the_cursor_is_read(samples, until):
    async with samples() as (desk, pilot):
        reading, table = desk.screen.query_one(Reading), desk.screen.query_one(Table)
        for key in (
            "j",
            "down",
            "k",
            "up",
            "G",
            "g",
            "pagedown",
            "pageup",
            "n",
            "N",
            "end",
            "home",
        ):
            await pilot.press(key)
            await until(
                pilot, lambda: (reading.sample["step"], reading.sample["index"]) == table.key
            )


async def test_s_sorts_by_each_column_and_r_turns_it(samples, until):
    async with samples() as (desk, pilot):
        await pilot.press("s")
        table = desk.screen.query_one(Table)
        await until(pilot, lambda: table.sorted_by == "score")
        rows = desk.screen._rows
        assert list(rows.values()) == sorted(rows.values(), key=lambda r: -r["score"])
        await pilot.press("r")
        await until(pilot, lambda: not table.descending)
        await pilot.press("s")
        await until(pilot, lambda: table.sorted_by == "KL")


@pytest.mark.parametrize("key", ["slash", "f"])
async def test_a_filter_narrows_the_table_and_esc_takes_it_away(samples, key, until):
    async with samples() as (desk, pilot):
        await pilot.press(key)
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"score>2 kl<8", "enter")
        await until(
            pilot,
            lambda: (
                desk.screen._rows
                and all(r["score"] >= 2 and r["kl"] <= 8 for r in desk.screen._rows.values())
            ),
        )
        await pilot.press("escape")
        await until(pilot, lambda: desk.screen.query_one(Table).count() == 500)


@pytest.mark.parametrize(
    ("forth", "back"), [("full_stop", "comma"), ("greater_than_sign", "less_than_sign")]
)
async def test_pages_are_turned(samples, forth, back, until):
    async with samples() as (desk, pilot):
        first = next(iter(desk.screen._rows))
        await pilot.press(forth)
        await until(pilot, lambda: next(iter(desk.screen._rows)) != first)
        await pilot.press(back)
        await until(pilot, lambda: next(iter(desk.screen._rows)) == first)


async def test_v_shows_a_number_of_each_token(samples, until):
    async with samples() as (desk, pilot):
        reading = desk.screen.query_one(Reading)
        await until(pilot, lambda: reading.arrays is not None, "the arrays")
        for mode in ("KL", "log-prob", "advantage", "value", "text"):
            await pilot.press("v")
            assert reading.mode == mode
            text = "".join(p for row in reading._body for p, _ in row)
            assert ("largest" in text) == (mode != "text")


async def test_enter_reads_and_z_reads_alone(samples, until):
    async with samples() as (desk, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: desk.screen.query_one(Reading).has_focus)
        await pilot.press("escape")
        await until(pilot, lambda: desk.screen.query_one(Table).has_focus)
        await pilot.press("z")
        await until(pilot, lambda: not desk.screen.query_one(Table).display)
        await pilot.press("escape")
        await until(pilot, lambda: desk.screen.query_one(Table).display)


# -- checkpoints --------------------------------------------------------------------------------


async def test_roll_back_asks_and_cancel_has_the_focus(make_desk, engine, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: desk.screen.query_one(Table).count() == 4)
        await pilot.press("j", "r")
        await until(pilot, lambda: isinstance(desk.screen, Ask))
        await pilot.press("enter")
        await until(pilot, lambda: len(desk.screen_stack) == 1)
        assert engine == []
        await pilot.press("r", "r")
        await until(pilot, lambda: engine == [steer.Rollback(step=150)])


@pytest.mark.parametrize(
    ("key", "words"),
    [("f", ["fork", "frozen", "--from", "200"]), ("E", ["export", "frozen", "--policy"])],
)
async def test_branch_and_export_run_our_own_commands(
    make_desk, monkeypatch, key, words, running, until
):
    ran = []
    desk = make_desk()
    monkeypatch.setattr(desk, "_run", lambda arguments: ran.append(arguments) or "")
    async with running(desk) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: desk.screen.query_one(Table).count() == 4)
        await pilot.press(key)
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press("enter")
        await until(pilot, lambda: ran)
        assert ran[0][: len(words)] == words


# -- log ----------------------------------------------------------------------------------------


async def test_the_log_is_searched(make_desk, running, until):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press("5")
        view = desk.screen.query_one("#log")
        await until(pilot, lambda: view.count() == 303)
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await pilot.press(*"step 2 ", "enter")
        await until(pilot, lambda: desk.screen._words == "step 2")
        top = view.top
        await pilot.press("N")
        assert view.top < top
        await pilot.press("n")
        assert view.top == top
        await pilot.press("g", "right")
        assert (view.top, view.shift) == (0, 20)
        await pilot.press("left", "G", "escape")
        assert view.shift == 0
        assert view.matching == ""
        assert view.lines[-1] == "weights: 100%"


# -- sessions -----------------------------------------------------------------------------------


@pytest.fixture
def browser(make_desk, monkeypatch, running, until):
    @contextlib.asynccontextmanager
    async def open_browser():
        desk = make_desk(None)
        desk.ran = []
        monkeypatch.setattr(desk, "_run", lambda arguments: desk.ran.append(arguments) or "")
        async with running(desk) as pilot:
            await until(pilot, lambda: desk.screen.query_one(Table).count() >= 1)
            yield desk, pilot

    return open_browser


async def test_enter_opens_a_session(browser, until):
    async with browser() as (desk, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: desk.current_mode == "dashboard" and desk.book.head.step == 200)


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["n"], ["demo", "--detach"]), (["r"], ["resume", "frozen", "--detach"]),
     (["f", "enter"], ["fork", "frozen", "--from", "200"]), (["d", "d"], ["rm", "frozen", "-y"])],
)  # fmt: skip
async def test_sessions_are_started_resumed_forked_and_deleted(browser, keys, words, until):
    async with browser() as (desk, pilot):
        await pilot.press(keys[0])
        if len(keys) > 1:
            await until(pilot, lambda: len(desk.screen_stack) == 2)
            await pilot.press(keys[1])
        await until(pilot, lambda: desk.ran)
        assert desk.ran[0][: len(words)] == words


async def test_deleting_asks_and_cancel_has_the_focus(browser, until):
    async with browser() as (desk, pilot):
        await pilot.press("d")
        await until(pilot, lambda: isinstance(desk.screen, Ask))
        await pilot.press("enter")
        await until(pilot, lambda: len(desk.screen_stack) == 1)
        assert desk.ran == []


async def test_an_empty_folder_says_what_starts_a_run(make_desk, tmp_path, running, until):
    desk = make_desk(None, root=tmp_path / "none")
    async with running(desk) as pilot:
        table = desk.screen.query_one(Table)
        await until(pilot, lambda: any("rlhf-tui demo" in p for r in table.empty() for p, _ in r))


async def test_screens_of_a_session_need_one(make_desk, running):
    desk = make_desk(None)
    async with running(desk) as pilot:
        await pilot.press("2")
        assert desk.current_mode == "sessions"


async def test_a_session_that_is_not_there_is_named(make_desk, running, until):
    desk = make_desk("nobody")
    async with running(desk) as pilot:
        await until(pilot, lambda: desk._notifications)
        assert "nobody" in str([n.message for n in desk._notifications])
        assert desk.current_mode == "sessions"


# -- dialogs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["S", "b", "m", "question_mark"])
async def test_a_key_on_its_way_to_a_dialog_that_closes_does_no_harm(
    make_desk, engine, key, running, until
):
    desk = make_desk()
    async with running(desk) as pilot:
        await pilot.press(key)
        await until(pilot, lambda: len(desk.screen_stack) == 2)
        dialog = desk.screen
        for _ in range(3):
            dialog.post_message(Key("escape", None))
            dialog.action_cancel()
        await until(pilot, lambda: len(desk.screen_stack) == 1)
        await pilot.pause()
        assert desk.is_running


def burst(desk, *keys):
    """Keys that arrive together, as quick typing does over a slow connection."""
    for key in keys:
        character = {"backspace": "\x7f", "enter": "\r", "full_stop": "."}.get(key, key)
        desk.post_message(Key(key, character))


async def test_what_is_typed_ahead_goes_into_the_dialog(make_desk, running, until):
    desk = make_desk()
    desk.can_steer = lambda: True
    async with running(desk) as pilot:
        burst(desk, "b", "1", "full_stop", "5")
        await until(pilot, lambda: isinstance(desk.screen, Type))
        await until(pilot, lambda: desk.screen.query_one("#field").value == "1.5")
        assert desk.current_mode == "dashboard"


async def test_a_burst_of_backspaces_and_text_keeps_its_order(make_desk, running, until):
    desk = make_desk()
    desk.can_steer = lambda: True
    async with running(desk) as pilot:
        await pilot.press("b")
        burst(desk, *["backspace"] * 4, "0", "full_stop", "2", "backspace", "3")
        await until(pilot, lambda: desk.screen.query_one("#field").value == "0.3")


async def test_a_note_typed_in_one_go_is_sent_whole(make_desk, running, until, monkeypatch):
    desk = make_desk()
    sent = []
    monkeypatch.setattr(desk, "can_steer", lambda: True)
    monkeypatch.setattr(desk, "command", lambda command, text: sent.append(command))
    async with running(desk) as pilot:
        burst(desk, *"wpause q", "enter")
        await until(pilot, lambda: sent == [Note(text="pause q")])
        assert desk.is_running
