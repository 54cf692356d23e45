"""The keys that steer, pressed on a session whose engine obeys."""

import pytest
from textual.events import Paste

from engine.config.settings import LIVE_SETTINGS, SettingChange, settings_of
from engine.errors import CommandRejectedError
from engine.journal.writer import JournalWriter
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Note, Probe, SetSetting
from rlhf_tui.app import steering
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.app.forms.settings_input import OFF, parse_value
from rlhf_tui.dialogs.base import ChoiceDialog, InputDialog, MessageLine
from rlhf_tui.dialogs.picker import PickerDialog
from rlhf_tui.dialogs.text import ProbeDialog
from rlhf_tui.state.messages import CommandAnswered
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.lines import row_width
from rlhf_tui.widgets.scroll_list import THUMB, TRACK, ScrollText
from rlhf_tui.widgets.table import Table
from rlhf_tui.widgets.text_input import TextInput
from tests.engine.demo_config import demo
from tests.tui.screen import notices, press_for


async def test_p_pauses(run_app, engine, until):
    async with run_app() as (_, pilot):
        await pilot.press("p")
        await until(pilot, lambda: engine == [steering.Pause()])


async def test_a_second_p_unpauses_although_the_first_is_not_read_back_yet(run_app, engine, until):
    async with run_app() as (_, pilot):
        await pilot.press("p", "p", "p")
        await until(
            pilot, lambda: engine == [steering.Pause(), steering.Unpause(), steering.Pause()]
        )


async def test_a_run_that_others_pause_again_at_once_can_be_unpaused_again(
    engine, session_maker, tmp_path, running, until
):
    session = session_maker(tmp_path / "s", "run", 3)
    journal = JournalWriter(session)
    journal.set_meta(state="paused")
    journal.close()
    app = RlhfApp(tmp_path / "s", "run")

    def offered():
        return {b.binding.action for b in app.screen.active_bindings.values()}

    async with running(app) as pilot:
        await until(pilot, lambda: "steer('unpause')" in offered())
        await pilot.press("p")
        # Nothing else is read of the run: before and after the command it is paused.
        await until(pilot, lambda: engine and "steer('unpause')" in offered())
        await pilot.press("p")
        await until(pilot, lambda: engine == [steering.Unpause(), steering.Unpause()])


@pytest.mark.parametrize(
    ("key", "value"), [("right_square_bracket", 0.088), ("left_square_bracket", 0.07273)]
)
async def test_brackets_nudge_beta_by_a_tenth(run_app, engine, key, value, until):
    async with run_app() as (_, pilot):
        await pilot.press(key)
        await until(pilot, lambda: engine == [steering.SetBeta(value=value)])


async def test_nudges_add_up(run_app, engine, until):
    async with run_app() as (_, pilot):
        await pilot.press("right_square_bracket", "right_square_bracket")
        await until(
            pilot, lambda: engine == [steering.SetBeta(value=0.088), steering.SetBeta(value=0.0968)]
        )


async def test_b_asks_for_beta_and_shows_old_and_new(run_app, engine, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, "b")
        await until(pilot, lambda: app.screen.query("#effect"))
        effect = app.screen.query_one("#effect")
        await until(pilot, lambda: effect.text().strip() == "unchanged")
        await pilot.press(*"0.12")
        await until(pilot, lambda: "0.08 → 0.12" in effect.text())
        said = " ".join(line.text() for line in app.screen.query(MessageLine))
        assert "adaptive controller changes it from there" in said
        assert "enter set" in said
        await pilot.press("enter")
        await until(pilot, lambda: engine == [steering.SetBeta(value=0.12)])


async def test_a_wrong_value_is_not_sent_and_the_dialog_says_why(run_app, engine, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, "b")
        await pilot.press(*"-3", "enter")
        assert isinstance(app.screen, InputDialog)
        effect = app.screen.query_one("#effect")
        assert effect.rows(*effect.size)[0][0][1] == "warn"
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, InputDialog))
    assert engine == []


async def test_a_hands_beta_over_and_takes_it_back(run_app, engine, until):
    async with run_app() as (_, pilot):
        await pilot.press("a")
        await until(pilot, lambda: engine == [steering.SetKLController(controller="fixed")])


@pytest.mark.parametrize("name", LIVE_SETTINGS)
def test_what_a_setting_that_is_off_means_is_said_where_it_may_be_off(name):
    settings = settings_of(demo())
    if name in OFF:
        assert parse_value(name, "off", settings) is None
    else:
        with pytest.raises(CommandRejectedError):
            SetSetting(key=name, value=None).new_values(settings)


@pytest.mark.parametrize(("key", "command"), [("u", steering.Undo()), ("c", steering.Checkpoint())])
async def test_undo_and_checkpoint_are_one_key(run_app, engine, key, command, until):
    async with run_app() as (_, pilot):
        await pilot.press(key)
        await until(pilot, lambda: engine == [command])


HIGH = "clip_range_high"


async def test_e_sets_any_setting(run_app, engine, until):
    async with run_app() as (_, pilot):
        await press_for(pilot, PickerDialog, "e")
        await press_for(pilot, InputDialog, *"learning", "enter")
        await pilot.press(*"1e-4", "enter")
        await until(pilot, lambda: engine == [steering.SetSetting(key="learning_rate", value=1e-4)])


@pytest.mark.parametrize(
    "typed",
    ["lerning_rate=1e-4", "learning_rate = 1e-4", "train.learning_rate=1e-4", "lr=1e-4"],
)
async def test_e_takes_the_value_with_the_name_as_the_command_line_does(
    run_app, engine, until, typed
):
    async with run_app() as (app, pilot):
        await press_for(pilot, PickerDialog, "e")
        app.screen.query_one("#search").value = typed
        await press_for(pilot, InputDialog, "enter")
        assert app.screen.query_one("#field").value == "1e-4"
        await pilot.press("enter")
        await until(pilot, lambda: engine == [steering.SetSetting(key="learning_rate", value=1e-4)])


@pytest.mark.parametrize(
    ("keys", "key"),
    [((*"clip", "enter", *"0.3"), "clip_range"), ((*"clip", "down", *"=0.3", "enter"), HIGH)],
)
async def test_enter_takes_the_setting_that_fits_best_or_the_one_that_was_moved_to(
    run_app, engine, until, keys, key
):
    async with run_app() as (_, pilot):
        await press_for(pilot, PickerDialog, "e")
        await press_for(pilot, InputDialog, *keys)
        await pilot.press("enter")
        await until(pilot, lambda: engine == [steering.SetSetting(key=key, value=0.3)])


@pytest.mark.usefixtures("engine")
async def test_a_misspelled_setting_shows_those_with_similar_names(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, PickerDialog, "e")
        await pilot.press(*"entropi")
        await until(pilot, lambda: app.screen.query_one(Table).key == "entropy_coef")
        assert "no match; these names are similar" in app.screen.query_one("#keys").text()
        await pilot.press("backspace")
        await until(pilot, lambda: "no match" not in app.screen.query_one("#keys").text())
        await pilot.press(*"qqqqqqqqq")
        await until(pilot, lambda: app.screen.query_one(Table).key is None)
        assert "no match" in app.screen.query_one(Table).text()


@pytest.mark.usefixtures("engine")
async def test_a_list_longer_than_the_terminal_has_a_scroll_bar(run_app, until):
    async with run_app(size=(80, 24)) as (app, pilot):
        await press_for(pilot, PickerDialog, "e")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.size.height > 0)
        shown = [row[-1][0] for row in table.rows(table.size.width, table.size.height)]
        assert set(shown) == {THUMB, TRACK}


@pytest.mark.parametrize(
    ("value", "sent"),
    [("adaptive", []), ("fixed", [steering.SetKLController(controller="fixed")]), ("on", [])],
)
async def test_a_controller_typed_with_its_name_is_set_not_switched(
    run_app, engine, until, value, sent
):
    async with run_app() as (app, pilot):
        await press_for(pilot, PickerDialog, "e")
        app.screen.query_one("#search").value = f"controller={value}"
        await pilot.press("enter")
        footer = app.screen_stack[0].query_one(KeyFooter)
        told = lambda: "controller" in " ".join([footer.text(), *notices(app)])  # noqa: E731
        await until(pilot, lambda: told() or engine)
        assert engine == sent


@pytest.mark.parametrize(
    ("keys", "sent"),
    [(["enter"], [steering.Stop()]), (["n"], [steering.Stop(now=True)]),
     (["escape"], []), (["c"], []),
     (["right", "right", "enter"], [])],
)  # fmt: skip
async def test_stop_asks_and_the_safe_answer_has_the_focus(run_app, engine, keys, sent, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, ChoiceDialog, "S")
        await pilot.press(*keys)
        await until(pilot, lambda: not isinstance(app.screen, ChoiceDialog))
        await until(pilot, lambda: engine == sent)


@pytest.mark.parametrize("width", [80, 60, 40])
async def test_all_answers_are_in_sight_in_a_narrow_terminal(run_app, engine, width, until):
    def in_sight():
        box = app.screen.query_one(".dialog").content_region
        return all(button.region in box for button in app.screen.query(".answers Button"))

    async with run_app(size=(width, 24)) as (app, pilot):
        await press_for(pilot, ChoiceDialog, "S")
        await until(pilot, in_sight)
        await pilot.resize_terminal(120, 40)
        answers = app.screen.query_one(".answers")
        await until(pilot, lambda: in_sight() and answers.size.height == 1)


async def test_w_writes_a_note(run_app, engine, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, "w")
        assert "enter add" in list(app.screen.query(MessageLine))[-1].text()
        await pilot.press(*"odd", "enter")
        await until(pilot, lambda: engine == [steering.Note(text="odd")])


async def test_responses_to_a_probe_wait_until_nobody_types_into_a_dialog(run_app, until):
    async with run_app() as (app, pilot):
        app.push_screen(InputDialog("Add a note", [], verb="add"))
        await until(pilot, lambda: app.screen.query("#field"))
        result = {n: {"response": n, "score": 1.0, "kl": 2.0, "length": 2}
                  for n in ("policy", "reference")}  # fmt: skip
        answer = CommandReply(id="p", status="applied", step=3, result=result)
        app.post_message(CommandAnswered(app.session, "probe", steering.Probe(text="x"), answer))
        footer = app.screen_stack[0].query_one(KeyFooter)
        await until(pilot, lambda: "probe: applied" in footer.text())
        await pilot.press(*"odd")
        assert app.screen.query_one("#field").value == "odd"
        await press_for(pilot, ProbeDialog, "escape")


@pytest.mark.parametrize(
    ("key", "command"),
    [("x", Probe(text="Q: 2 + 2\n\nA: four")), ("w", Note(text="Q: 2 + 2  A: four"))],
    ids=["probe", "note"],
)
async def test_all_lines_of_a_pasted_text_are_taken(run_app, engine, until, key, command):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, key)
        app.screen.query_one(TextInput).post_message(Paste("Q: 2 + 2\r\n\r\nA: \n"))
        await until(pilot, lambda: app.screen.query_one(TextInput).value.endswith("A: "))
        await pilot.press(*"four", "enter")
        await until(pilot, lambda: engine == [command])


async def test_x_probes_and_shows_both_responses(run_app, engine, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, "x")
        await press_for(pilot, ProbeDialog, *"hello", "enter")
        await until(pilot, lambda: app.screen.query_one(ScrollText).size.width > 0)
        text = app.screen.query_one(ScrollText).text()
        assert "policy says" in text
        assert "reference says" in text


async def test_responses_to_a_probe_without_a_score_say_why(make_app, running, until):
    app = make_app()
    told = {"response": "some words", "score": None, "kl": 2.0, "unscored": "it takes 'answer'"}
    result = {"policy": told, "reference": told}
    answer = CommandReply(id="1", status="applied", step=201, result=result)
    async with running(app) as pilot:
        app.post_message(CommandAnswered(app.session, "probe", steering.Probe(text="x"), answer))
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await until(pilot, lambda: app.screen.query_one(ScrollText).size.height > 0)
        text = app.screen.query_one(ScrollText).text()
        assert "some words" in text
        assert text.count("no score: it takes 'answer'") == 1


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_long_responses_to_a_probe_are_whole_and_scroll(make_app, size, running, until):
    app = make_app()
    long = {"response": "word " * 600 + "end", "score": 1.0, "kl": 2.0}
    result = {"policy": long, "reference": long}
    answer = CommandReply(id="1", status="applied", step=201, result=result)
    async with running(app, size) as pilot:
        app.post_message(CommandAnswered(app.session, "probe", steering.Probe(text="x"), answer))
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await until(pilot, lambda: app.screen.query_one(ScrollText).size.height > 0)
        texts = app.screen.query_one(ScrollText)
        assert app.screen.query_one(".dialog").region.bottom <= size[1]
        rows = [texts.row(index, texts.size.width) for index in range(texts.count())]
        assert all(row_width(row) <= texts.size.width for row in rows)
        await pilot.press("G")
        assert "end" in texts.rows(*texts.size)[-1][0][0]
        await pilot.press("enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)


async def test_read_only_has_no_commands(run_app, engine, until):
    async with run_app(read_only=True) as (app, pilot):
        for key in ("p", "b", "a", "u", "c", "e", "S", "w", "x", "right_square_bracket"):
            app.clear_notifications()
            await pilot.press(key)
            await until(pilot, lambda: notices(app) == ["read-only: commands are disabled"])
            assert len(app.screen_stack) == 1
            assert engine == []
        actions = {b.binding.action for b in app.screen.active_bindings.values()}
        assert not [action for action in actions if action.startswith("steer(")]


async def test_without_an_engine_a_command_names_what_starts_one(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("p")
        await until(pilot, lambda: notices(app))
        assert "rlhf-tui resume frozen" in str(notices(app))


async def test_each_status_of_a_command_is_shown(run_app, engine, until):
    async with run_app() as (app, pilot):
        await pilot.press("c")
        keys = app.screen.query_one(KeyFooter)
        await until(pilot, lambda: "frozen: step 200 saved" in keys.text())


async def test_the_notice_of_an_applied_change_has_the_values_of_its_step(run_app, engine, until):
    async with run_app() as (app, pilot):
        await pilot.press("right_square_bracket")
        applied = "frozen: beta 0.075 → 0.088: applied at step 201"
        await until(pilot, lambda: applied in app.screen.query_one(KeyFooter).text())


async def test_the_notice_of_an_undo_says_what_it_took_back(make_app, running, until):
    app = make_app()
    change = SettingChange(key="beta", old=0.2, new=0.1)
    reply = CommandReply(id="1", status="applied", step=201, changes=[change])
    async with running(app) as pilot:
        app.post_message(CommandAnswered(app.session, "undo", steering.Undo(), reply))
        applied = "frozen: undo: beta 0.2 → 0.1: applied at step 201"
        await until(pilot, lambda: applied in app.screen.query_one(KeyFooter).text())


@pytest.mark.parametrize(
    ("state", "key", "reason"),
    [
        ("starting", "right_square_bracket", "is starting"),
        ("starting", "u", "is starting"),
        ("stopping", "p", "is stopping"),
    ],
)
async def test_what_a_run_does_not_take_now_is_not_offered_and_says_why(
    run_app, engine, session_maker, tmp_path, until, state, key, reason
):
    session = session_maker(tmp_path / "s", "run", 3)
    journal = JournalWriter(session)
    journal.set_meta(state=state)
    journal.close()
    async with run_app("run", root=tmp_path / "s") as (app, pilot):
        await pilot.press(key)
        await until(pilot, lambda: notices(app))
        assert reason in notices(app)[0]
        assert " beta " not in app.screen.query_one(KeyFooter).text()
        assert engine == []
