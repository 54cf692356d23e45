"""The keys that steer, pressed on a session whose engine obeys."""

import pytest

from rlhf_tui.screens import steer
from rlhf_tui.screens.dialogs import Ask, Type
from rlhf_tui.screens.picker import Pick
from rlhf_tui.widgets.keys import Keys


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
