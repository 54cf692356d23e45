"""The selected checkpoint on a large terminal: why it stays, its numbers, what came after it."""

import json

import msgspec
import pytest

from engine.journal.rows import AlertEvent, CheckpointRow, EventRow
from engine.session.checkpoints import checkpoint_path
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.state.checkpoint_details import CheckpointDetails, read_details
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.widgets.panels.checkpoint import CheckpointPanel
from rlhf_tui.widgets.table import Table
from tests.judging import sample
from tests.privileges import held_to_modes
from tests.tui.panels import SETTINGS, make_state, text

AT_20 = CheckpointRow(20, 1, 1_700_000_000.0, 49_000_000, 1.2, 7.5, "complete")


def panel(state, checkpoint=AT_20, **details):
    shown = CheckpointPanel(state, ["policy/entropy_avg"])
    shown.select(checkpoint, [])
    shown.take(CheckpointDetails(checkpoint, **details))
    return shown


def alert(step):
    return EventRow(
        event=step, attempt=1, step=step, time=1.0, kind="alert",
        payload=AlertEvent(rule="kl_high", text=f"high at {step}"),
    )  # fmt: skip


@pytest.mark.parametrize(("size", "visible"), [((80, 20), False), ((120, 40), True)])
async def test_the_selected_checkpoint_is_shown_where_there_is_room(run_app, until, size, visible):
    async with run_app(size=size) as (app, pilot):
        await pilot.press("4")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 4)
        shown = app.screen.query_one(CheckpointPanel)
        await until(pilot, lambda: shown.display == visible)
        if visible:
            await until(pilot, lambda: "Responses of step 200" in shown.text())
            assert "last: a resume continues from it" in shown.text()
            await pilot.press("j")
            await until(pilot, lambda: "Responses of step 150" in shown.text())
            assert "one of the newest 3: stays until 2 more saves" in shown.text()


async def test_a_short_list_leaves_room_for_why_the_checkpoint_stays_and_its_metrics(
    run_app, until
):
    async with run_app(size=(80, 24)) as (app, pilot):
        await pilot.press("4")
        table, shown = app.screen.query_one(Table), app.screen.query_one(CheckpointPanel)
        await until(pilot, lambda: table.count() == 4 and "Metrics" in shown.text())
        assert "last: a resume continues from it" in shown.text()
        assert table.size.height > table.count()


@pytest.mark.parametrize("height", range(13, 24))
def test_no_heading_of_the_panel_is_without_a_line_below_it(height):
    state = make_state()
    state.take(SessionUpdate(events=[alert(step) for step in (30, 40, 41, 42)]))
    lines = text(panel(state, settings=SETTINGS, samples=[sample(20)]), height=height).split("\n")
    assert len(lines) <= height
    assert not lines[-1].strip().startswith(("Settings", "After", "Responses"))


def test_a_single_line_of_what_came_after_has_the_newest_event_and_no_number():
    state = make_state()
    state.take(SessionUpdate(events=[alert(step) for step in (30, 40)]))
    of_any_height = [text(panel(state, settings=SETTINGS), height=h) for h in range(8, 30)]
    (lines,) = [t for t in of_any_height if t.split("\n")[-2].strip() == "After step 20"]
    assert "high at 40" in lines.split("\n")[-1]


async def test_beside_the_list_there_is_room_on_a_wide_terminal(run_app, until):
    async with run_app(size=(200, 30)) as (app, pilot):
        await pilot.press("4")
        shown = app.screen.query_one(CheckpointPanel)
        await until(pilot, lambda: "Checkpoint of step 200" in shown.text())
        assert shown.region.x > app.screen.query_one(Table).region.x


async def test_without_checkpoints_there_is_no_panel(session_maker, tmp_path, running, until):
    session_maker(tmp_path, "new", 10)
    async with running(RlhfApp(tmp_path, "new", follow=False), size=(120, 40)) as pilot:
        await pilot.press("4")
        table = pilot.app.screen.query_one(Table)
        await until(pilot, lambda: "no checkpoint yet" in table.text())
        assert not pilot.app.screen.query_one(CheckpointPanel).display


def test_metrics_of_the_checkpoint_are_beside_those_of_the_newest_step():
    lines = [" ".join(line.split()) for line in text(panel(make_state())).splitlines()]
    assert "score 0.310 0.910 +0.600" in lines, "means of the steps 11 to 20, and 41 to 50"
    assert "KL 6.000 6.000 0" in lines


def test_a_change_that_the_digits_do_not_show_is_none():
    state = make_state()
    curve = [(step, 1.2 if step <= 20 else 1.20001) for step in range(1, 51)]
    state.take(SessionUpdate(curves={"policy/entropy_avg": curve}))
    (line,) = [line for line in text(panel(state)).splitlines() if "entropy" in line]
    assert line.split() == ["entropy", "1.200", "1.200", "0"]


def test_settings_that_a_roll_back_changes_are_listed():
    shown = text(panel(make_state(), settings=SETTINGS | {"beta": 0.1, "epochs": 2}))
    assert "beta 0.05 → 0.1   epochs 4 → 2" in shown
    assert "learning_rate" not in shown


def test_what_a_roll_back_would_abandon_is_listed_newest_first():
    state = make_state()
    state.take(SessionUpdate(events=[alert(step) for step in (10, 30, 40)]))
    shown = text(panel(state))
    assert shown.index("high at 40") < shown.index("high at 30")
    assert "high at 10" not in shown


def test_of_a_checkpoint_on_an_abandoned_branch_no_numbers_of_another_branch_are_shown():
    gone = msgspec.structs.replace(AT_20, status="superseded")
    shown = text(panel(make_state(), gone))
    assert "Checkpoint of step 20" in shown
    assert "Metrics" not in shown


def test_details_of_another_checkpoint_are_not_shown():
    shown = panel(make_state())
    other = msgspec.structs.replace(AT_20, step=30)
    shown.take(CheckpointDetails(other, settings=SETTINGS | {"beta": 0.1}))
    assert "beta" not in text(shown)


def test_details_are_read_from_the_folder_of_the_checkpoint(judged):
    folder = checkpoint_path(judged.checkpoints, 2)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"settings": {"beta": 0.2}}}))
    details = read_details(judged, msgspec.structs.replace(AT_20, step=2))
    assert details.folder == str(folder)
    assert details.settings == {"beta": 0.2}
    assert {sample.step for sample in details.samples} == {2}


def test_a_checkpoint_in_a_folder_of_another_user_is_shown_without_its_settings(judged):
    folder = checkpoint_path(judged.checkpoints, 2)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"settings": {"beta": 0.2}}}))
    judged.checkpoints.chmod(0)
    try:
        with held_to_modes():
            details = read_details(judged, msgspec.structs.replace(AT_20, step=2))
    finally:
        judged.checkpoints.chmod(0o700)
    assert (details.folder, details.settings) == ("", {})
    assert {sample.step for sample in details.samples} == {2}
