"""The keys of the screen Checkpoints, pressed on a frozen session."""

import contextlib
import json
import sqlite3
import threading

import pytest
from textual.widgets import Input

from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.session.folder import SessionFolder
from rlhf_tui.app import steering
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.app.launching import EngineStarter
from rlhf_tui.dialogs.base import ChoiceDialog, Dialog, InputDialog, MessageLine
from rlhf_tui.dialogs.form import FormDialog
from rlhf_tui.state.messages import CommandResult
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.table import Table
from tests.tui.screen import cells, notices, opened, press_for


@pytest.fixture
def checkpoints(run_app, until):
    return lambda: opened(run_app, until, "4", 4)


@pytest.fixture
def ran(monkeypatch):
    """The command lines that the app has run."""
    found = []

    def run(_starter, arguments):
        found.append(arguments)
        return CommandResult()

    monkeypatch.setattr(EngineStarter, "run_cli", run)
    return found


async def test_a_narrow_terminal_has_the_numbers_of_checkpoints_and_which_is_the_last(
    run_app, until
):
    async with run_app(size=(60, 18)) as (app, pilot):
        await pilot.press("4")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 4)
        first = table.text().splitlines()[1]
        assert first.split()[0] == "200"
        assert "7.50 last" in first


async def cancel_roll_back(app, pilot, until):
    """Asks for a roll back to the second checkpoint, and cancels by the button with the focus."""
    await press_for(pilot, ChoiceDialog, "j", "r")
    await pilot.press("enter")
    await until(pilot, lambda: len(app.screen_stack) == 1)


async def test_roll_back_asks_and_cancel_has_the_focus(checkpoints, engine, until):
    async with checkpoints() as (app, pilot):
        await cancel_roll_back(app, pilot, until)
        assert engine == []
        await pilot.press("r", "r")
        await until(pilot, lambda: engine == [steering.Rollback(step=150)])


async def test_roll_back_lists_the_settings_that_it_changes(judged, engine, running, until):
    settings = {**in_force(judged), "beta": 0.2, "controller": "fixed"}
    folder = judged.checkpoints / "step-000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"settings": settings}}))
    app = RlhfApp(judged.folder.parent, "judged", follow=False)
    async with running(app) as pilot:
        app.steering.ask_roll_back(app.steering_target(), 2, lambda reseed: None)
        await until(pilot, lambda: app.screen.query(MessageLine))
        lines = app.screen.query_one(MessageLine).text().splitlines()
        changed = [" ".join(line.split()) for line in lines if "→" in line]
        assert changed == ["beta 0.05 → 0.2", "controller adaptive → fixed"]


def in_force(session):
    with JournalReader(session) as reader:
        return reader.meta().settings


async def test_without_an_engine_roll_back_asks_too_where_steps_would_be_lost(
    checkpoints, ran, until
):
    async with checkpoints() as (app, pilot):
        await cancel_roll_back(app, pilot, until)
        assert ran == []
        await pilot.press("r", "n")
        await until(pilot, lambda: ran)
        assert ran == [["resume", "frozen", "--from", "150", "--reseed", "--detach"]]


async def test_a_roll_back_that_is_confirmed_after_the_run_has_ended_resumes_it(
    checkpoints, engine, ran, monkeypatch, until
):
    async with checkpoints() as (_, pilot):
        await press_for(pilot, ChoiceDialog, "j", "r")
        monkeypatch.setattr(SessionFolder, "is_live", lambda self: False)
        await pilot.press("r")
        await until(pilot, lambda: ran)
        assert ran == [["resume", "frozen", "--from", "150", "--detach"]]
        assert engine == []


async def test_d_asks_and_then_the_engine_deletes_the_checkpoint(checkpoints, engine, until):
    async with checkpoints() as (app, pilot):
        await press_for(pilot, ChoiceDialog, "j", "d")
        await pilot.press("enter")  # cancel has the focus
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert engine == []
        await press_for(pilot, ChoiceDialog, "d")
        await pilot.press("d")
        await until(pilot, lambda: engine == [steering.DeleteCheckpoint(step=150)])


async def test_without_an_engine_d_deletes_the_checkpoint_too(checkpoints, ran, until):
    async with checkpoints() as (_, pilot):
        await press_for(pilot, ChoiceDialog, "j", "d")
        await pilot.press("d")
        await until(pilot, lambda: ran == [["rm", "frozen", "--checkpoint", "150", "-y"]])


async def test_the_last_checkpoint_cannot_be_deleted(checkpoints, until):
    async with checkpoints() as (app, pilot):
        await pilot.press("d")
        reason = "the last checkpoint cannot be deleted: a resume continues from it"
        await until(pilot, lambda: reason in notices(app))


async def test_all_remarks_on_a_checkpoint_are_whole_in_80_columns(
    session_maker, tmp_path, running, until
):
    session = session_maker(tmp_path, "mine", 200)
    with contextlib.closing(JournalWriter(session)) as journal:
        alert = {"rule": "kl_high", "text": "high", "count": 1}
        journal.record_event("alert", alert, 197)
        journal.checkpoints.keep(150)
    async with running(RlhfApp(tmp_path, "mine", follow=False), size=(80, 24)) as pilot:
        await pilot.press("4")
        table = pilot.app.screen.query_one(Table)
        await until(pilot, lambda: "before alert @197, kept" in table.text())


async def test_a_checkpoint_that_an_operator_saved_is_marked(
    session_maker, tmp_path, running, until
):
    session = session_maker(tmp_path, "mine", 100)
    with contextlib.closing(JournalWriter(session)) as journal:
        journal.checkpoints.keep(50)
    async with running(RlhfApp(tmp_path, "mine", follow=False)) as pilot:
        await pilot.press("4")
        table = pilot.app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 2)
        assert ["kept" in line for line in table.text().splitlines()[1:3]] == [False, True]


async def test_from_the_newest_step_nothing_is_lost_and_the_run_is_resumed(checkpoints, ran, until):
    async with checkpoints() as (_, pilot):
        await press_for(pilot, FormDialog, "r")
        await pilot.press(*"train.steps=400", "enter")
        await until(pilot, lambda: ran)
        more = ["-o", "train.steps=400", "--detach"]
        assert ran == [["resume", "frozen", "--from", "200", *more]]


@pytest.mark.parametrize(
    ("key", "typed", "words"),
    [
        ("f", ["down", *"train.steps=400"], ["fork", "frozen", "--from", "200"]),
        ("E", [], ["export", "frozen", "--policy"]),
    ],
)
async def test_branch_and_export_run_our_own_commands(checkpoints, ran, key, typed, words, until):
    async with checkpoints() as (_, pilot):
        await press_for(pilot, Dialog, key)
        await pilot.press(*typed, "enter")
        await until(pilot, lambda: ran)
        assert ran[0][: len(words)] == words


async def test_an_export_to_a_folder_with_files_is_refused_in_the_dialog(
    checkpoints, ran, tmp_path, until
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    async with checkpoints() as (app, pilot):
        await press_for(pilot, InputDialog, "E")
        field, effect = app.screen.query_one(Input), app.screen.query_one("#effect", MessageLine)
        for folder, says in (("full", "it exists already; give a new or empty folder"), ("", "")):
            field.value = str(tmp_path / folder) if folder else ""
            await until(pilot, lambda says=says: effect.text().strip() == says)
            await pilot.press("enter")
            assert isinstance(app.screen, InputDialog)
        assert ran == []


async def test_an_export_says_that_it_has_begun_and_knows_the_home_folder(
    checkpoints, monkeypatch, tmp_path, until
):
    monkeypatch.setenv("HOME", str(tmp_path))
    ran, may_end = [], threading.Event()

    def run(_starter, arguments):
        ran.append(arguments)
        may_end.wait(60)
        return CommandResult()

    monkeypatch.setattr(EngineStarter, "run_cli", run)
    async with checkpoints() as (app, pilot):
        await press_for(pilot, InputDialog, "E")
        app.screen.query_one(Input).value = "~/policy"
        await pilot.press("enter")
        footer, folder = app.screen.query_one(KeyFooter), str(tmp_path / "policy")
        await until(pilot, lambda: "exporting the policy of step 200 to" in footer.text())
        may_end.set()
        await until(pilot, lambda: "the policy of step 200 is in" in footer.text())
        assert ran == [["export", "frozen", "--policy", folder, "--step", "200"]]


async def test_enter_on_a_checkpoint_names_the_keys_that_act_on_it(checkpoints, until):
    async with checkpoints() as (app, pilot):
        footer, keys = app.screen.query_one(KeyFooter), "E exports its policy"
        await pilot.press("enter")
        await until(pilot, lambda: keys in footer.text())
        assert "d deletes it" not in footer.text()  # it is the last one
        await pilot.press("j", "enter")
        await until(pilot, lambda: f"{keys}, d deletes it" in footer.text())


async def test_without_a_checkpoint_no_key_for_one_is_shown_and_it_says_why(
    session_maker, running, tmp_path, until
):
    session_maker(tmp_path, "short", 3)
    app = RlhfApp(tmp_path, "short", follow=False)
    async with running(app) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: "no checkpoint yet" in app.screen.query_one(Table).text())
        footer = app.screen.query_one(KeyFooter)
        assert "roll back" not in footer.text()
        await pilot.press("r")
        await until(pilot, lambda: "no checkpoint yet" in notices(app))


@pytest.mark.parametrize(
    ("alerts", "remarks"),
    [([], ["last, best score", ""]), ([20, 60, 80], ["last, best score", "before alert @60"])],
)
async def test_the_checkpoint_before_the_first_alert_is_marked(
    session_maker, running, tmp_path, until, alerts, remarks
):
    session = session_maker(tmp_path, "run", 100)
    with contextlib.closing(sqlite3.connect(session.journal_file)) as db, db:
        db.execute("DELETE FROM events WHERE kind = 'alert'")
        for step in alerts:
            data = json.dumps({"rule": "kl_high", "text": "high", "count": 1})
            db.execute(
                "INSERT INTO events (time, attempt, step, kind, data) VALUES (1, 1, ?, 'alert', ?)",
                (step, data),
            )
    app = RlhfApp(tmp_path, "run", follow=False)
    async with running(app) as pilot:
        await pilot.press("4")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: [cells(table, i)[-1] for i in range(2)] == remarks)


async def test_the_keys_of_checkpoints_are_those_of_the_selected_one(
    session_maker, running, tmp_path, until
):
    session = session_maker(tmp_path, "run", 100)
    with contextlib.closing(sqlite3.connect(session.journal_file)) as db, db:
        db.execute("UPDATE checkpoints SET status = 'superseded' WHERE step = 50")
    app = RlhfApp(tmp_path, "run", follow=False)
    async with running(app) as pilot:
        await pilot.press("4")
        table, footer = app.screen.query_one(Table), app.screen.query_one(KeyFooter)
        await until(pilot, lambda: table.key == (100, 1) and "roll back" in footer.text())
        await pilot.press("j")
        await until(pilot, lambda: table.key == (50, 1) and "roll back" not in footer.text())
        await pilot.press("r")
        await until(pilot, lambda: notices(app) == ["this checkpoint is of an abandoned branch"])


@pytest.mark.parametrize(("saved", "shown"), [((), True), ((20,), True), ((20, 30), False)])
async def test_a_checkpoint_that_could_not_be_saved_is_told_until_the_next_one_is(
    session_maker, tmp_path, running, until, saved, shown
):
    session = session_maker(tmp_path, "mine", 40)
    with contextlib.closing(JournalWriter(session)) as journal:
        for step in [s for s in saved if s < 25]:
            save(journal, step)
        journal.record_event("alert", {"rule": "checkpoint", "text": "no room: make some"}, 25)
        for step in [s for s in saved if s > 25]:
            save(journal, step)
    async with running(RlhfApp(tmp_path, "mine", follow=False), size=(80, 24)) as pilot:
        await pilot.press("4")
        table = pilot.app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == len(saved) and pilot.app.state.known)
        line = pilot.app.screen.query_one("#best")
        await until(pilot, lambda: line.display == shown)
        if shown:
            assert line.text() == " ! step 25: no room: make some"


async def test_why_a_checkpoint_could_not_be_saved_is_wrapped_anew_in_another_width(
    session_maker, tmp_path, running, until
):
    session = session_maker(tmp_path, "mine", 40)
    with contextlib.closing(JournalWriter(session)) as journal:
        text = " ".join(["no room: make some"] * 7)
        journal.record_event("alert", {"rule": "checkpoint", "text": text}, 25)
    async with running(RlhfApp(tmp_path, "mine", follow=False), size=(160, 24)) as pilot:
        await pilot.press("4")
        line = pilot.app.screen.query_one("#best")
        await until(pilot, lambda: line.text() == f" ! step 25: {text}")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: line.text().split("\n")[1:] and line.size.height == 2)
        assert " ".join(line.text().split()) == f"! step 25: {text}"


def save(journal, step):
    journal.checkpoints.record(step, 49_000_000, 1.2, 7.5)
    journal.checkpoints.complete(step)
