"""Every key that works on all screens, pressed on a frozen session."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest
from textual.events import Key

from engine.protocol.commands import Note
from engine.session.folder import SessionFolder
from rlhf_tui.dialogs.base import ChoiceDialog, InputDialog, MessageLine
from rlhf_tui.dialogs.digest import DigestDialog
from rlhf_tui.dialogs.help import COLUMN, HelpDialog, help_groups, stacked
from rlhf_tui.format import freed
from rlhf_tui.state.messages import CommandResult
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.lines import row_width
from rlhf_tui.widgets.scroll_list import ScrollText
from rlhf_tui.widgets.table import Table
from tests.tui.screen import notices, press_for

FINISHED = Path(__file__).parents[1] / "data" / "sessions-0.1.0" / "sessions" / "finished"
"""A whole session, checkpoints and all."""


async def test_a_digit_goes_to_its_screen(make_app, running, until):
    app = make_app()
    screens = {"1": "sessions", "3": "samples", "2": "dashboard", "4": "checkpoints", "5": "log"}
    async with running(app) as pilot:
        for key, mode in screens.items():
            await pilot.press(key)
            await until(pilot, lambda mode=mode: app.current_mode == mode)


async def test_a_digest_does_not_take_a_key_that_is_meant_for_the_screen(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("2")
        await until(pilot, lambda: app.current_mode == "dashboard")
        app.push_screen(DigestDialog("run since you left", [[("steps 1 → 9", "strong")]]))
        await until(pilot, lambda: isinstance(app.screen, DigestDialog))
        await press_for(pilot, HelpDialog, "question_mark")
        await pilot.press("escape")
        assert not isinstance(app.screen, DigestDialog)


async def test_a_click_on_a_tab_goes_to_its_screen(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.click("#tabs", offset=(28, 0))
        await until(pilot, lambda: app.current_mode == "samples")


async def test_a_click_is_measured_by_the_tabs_as_they_are_drawn(
    run_app, tmp_path, session_maker, until
):
    root, name = tmp_path / "s", "a-session-of-a-long-name"
    session_maker(root, name, 3)
    async with run_app(name, root=root, size=(80, 24)) as (app, pilot):
        drawn = app.screen.query_one("#tabs").text()
        await pilot.click("#tabs", offset=(drawn.index("3"), 0))
        await until(pilot, lambda: app.current_mode == "samples")


async def test_a_click_needs_a_session_as_the_key_does(make_app, running, until):
    app = make_app(None)
    async with running(app) as pilot:
        await until(pilot, lambda: app.screen.query_one(Table).count())
        await pilot.click("#tabs", offset=(16, 0))
        await until(pilot, lambda: notices(app) == ["open a session first: enter opens frozen"])
        assert app.current_mode == "sessions"


async def test_keys_that_need_a_session_say_the_same_if_there_is_none(
    make_app, tmp_path, running, until
):
    app = make_app(None, root=tmp_path)
    async with running(app) as pilot:
        for key in "2p":
            await pilot.press(key)
            await until(pilot, lambda: notices(app) == ["no session selected; n starts a demo"])
            app.clear_notifications()
            await until(pilot, lambda: not notices(app))


async def test_a_box_ends_the_notice_whose_end_it_would_cover(make_app, running, until):
    app = make_app()
    async with running(app) as pilot:
        keys = app.screen.query_one(KeyFooter)
        app.say("theme: dark")
        await until(pilot, lambda: "theme: dark" in keys.text())
        app.say("read-only", "warning")
        await until(pilot, lambda: notices(app) and "help" in keys.text())


@pytest.mark.parametrize("key", ["q", "ctrl+c", "alt+q"])
async def test_leaving_detaches_and_says_how_to_come_back(
    make_app, monkeypatch, key, root, running, until
):
    app = make_app()
    SessionFolder(root / "frozen").write_engine("nowhere", "1")
    monkeypatch.setattr(SessionFolder, "is_live", lambda self: True)
    async with running(app) as pilot:
        await pilot.press(key)
        await until(pilot, lambda: app.exit_message)
    assert "still running; reattach with rlhf-tui attach frozen" in app.exit_message
    SessionFolder(root / "frozen").engine_file.unlink()


async def test_escape_and_q_at_once_leave_a_dialog_and_the_app(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, HelpDialog, "question_mark")
        await pilot.press("alt+q")  # as a terminal sends them
        await until(pilot, lambda: not app.is_running)


@pytest.mark.parametrize("size", [(120, 40), (1, 1)])
async def test_a_finished_session_is_left_without_a_word(run_app, until, size):
    async with run_app(size=size) as (app, pilot):
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)
    assert app.exit_message == ""


async def test_help_lists_every_binding_that_has_words(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, HelpDialog, "question_mark")
        text = app.screen.query_one(ScrollText).text()
        for words in (
            "pause",
            "beta +10 %",
            "crosshair left",
            "next event",
            "detach",
            "probe with a prompt",
        ):
            assert words in text
        await pilot.press("escape")
        await until(pilot, lambda: app.current_mode == "dashboard" and len(app.screen_stack) == 1)


async def test_the_help_of_every_screen_fits_its_two_columns(run_app, until):
    async with run_app(size=(120, 40)) as (app, pilot):
        for key in "12345":
            await press_for(pilot, HelpDialog, key, "question_mark")
            groups = help_groups(app.screen_stack[-2])
            left = stacked({n: g for n, g in groups.items() if n != "Everywhere"})
            assert max(map(row_width, left)) < COLUMN
            assert "…" not in app.screen.query_one(ScrollText).text()
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(app.screen, HelpDialog))


@pytest.mark.parametrize(("key", "several"), [("2", True), ("3", True), ("4", False), ("5", False)])
async def test_the_help_has_keys_between_panels_where_there_are_several(
    run_app, until, key, several
):
    async with run_app() as (app, pilot):
        await press_for(pilot, HelpDialog, key, "question_mark")
        assert ("next panel" in app.screen.query_one(ScrollText).text()) == several


async def test_t_changes_the_theme(run_app):
    async with run_app() as (app, pilot):
        seen = {app.theme}
        for _ in range(2):
            await pilot.press("t")
            seen.add(app.theme)
        assert seen == {"dark", "light", "contrast"}


@pytest.fixture
def browser(make_app, monkeypatch, running, until):
    @contextlib.asynccontextmanager
    async def open_browser():
        app = make_app(None)
        app.ran = []
        monkeypatch.setattr(
            app.engines, "run_cli", lambda arguments: app.ran.append(arguments) or CommandResult()
        )
        async with running(app) as pilot:
            await until(pilot, lambda: app.screen.query_one(Table).count() >= 1)
            yield app, pilot

    return open_browser


async def test_nothing_of_the_line_below_is_left_beside_a_notice(browser, until):
    async with browser() as (app, pilot):
        app.say("read-only", "warning")
        await until(pilot, lambda: notices(app) and app.screen.query_one("Toast").region)
        box = app.screen.query_one("Toast").region
        assert (box.x, box.right) == (0, app.size.width)


async def test_a_notice_of_keys_in_quick_succession_is_shown_once(browser, until):
    async with browser() as (app, pilot):
        for text in ("off", "off", "also off", "off"):
            app.say(text, "warning")
        await until(pilot, lambda: notices(app) == ["off", "also off"])
        app.clear_notifications()
        await until(pilot, lambda: not notices(app))
        app.say("off", "warning")
        await until(pilot, lambda: notices(app) == ["off"])


async def test_enter_opens_a_session(browser, until):
    async with browser() as (app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: app.current_mode == "dashboard" and app.state.head.step == 200)


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["n", "s"], ["demo", "--name", "demo", "--detach"]), (["d", "d"], ["rm", "frozen", "-y"])],
)
async def test_sessions_are_started_and_deleted(browser, keys, words, until):
    async with browser() as (app, pilot):
        await pilot.press(keys[0])
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.press(keys[1])
        await until(pilot, lambda: app.ran)
        assert app.ran[0][: len(words)] == words


async def test_a_resume_that_had_nothing_to_do_shows_its_own_message(browser, monkeypatch, until):
    async with browser() as (app, pilot):
        words = "session 'frozen' has finished its 200 steps"
        result = CommandResult(last_line=words, notices=["kept from 'frozen': ppo.epochs 2"])
        monkeypatch.setattr(app.engines, "run_cli", lambda arguments: result)
        app.engines.start(["resume", "frozen"], "frozen")
        await until(pilot, lambda: notices(app))
        assert notices(app) == [*result.notices, words]


def test_a_command_s_own_lines_are_told_apart_from_those_of_its_libraries(
    make_app, tmp_path, monkeypatch
):
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\n{ echo 'rlhf-tui: one'; echo noise; echo 'rlhf-tui: two'; } >&2\n"
        "echo first; echo last\nexit ${CODE:-0}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    run = make_app(None).engines.run_cli
    assert run([]) == CommandResult(last_line="last", notices=["one", "two"])
    monkeypatch.setenv("CODE", "1")
    assert run([]) == CommandResult(problem="two", last_line="last", notices=["one"])


async def test_the_last_line_of_our_own_command_is_shown(run_app, tmp_path, until):
    shutil.copytree(FINISHED, tmp_path / "finished")
    config = tmp_path / "finished" / "config.yaml"
    config.write_text(config.read_text().replace("@FOLDER@", str(tmp_path)))
    async with run_app(None, root=tmp_path) as (app, pilot):
        await until(pilot, lambda: app.screen.query_one(Table).count() == 1)
        app.engines.start(["resume", "finished"], "finished")
        await until(pilot, lambda: notices(app), deadline=60)  # it is a process of its own
        (said,) = notices(app)
        assert said.startswith("session 'finished' has finished its 6 steps")


@pytest.mark.parametrize("key", ["d", "n"])
async def test_deleting_and_starting_ask_and_cancel_has_the_focus(browser, key, until):
    async with browser() as (app, pilot):
        await press_for(pilot, ChoiceDialog, key)
        await pilot.press("enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.ran == []


def text_of_dialog(app):
    """The text above the buttons of the dialog in sight; empty if there is none."""
    return "".join(line.text() for line in app.screen.query(MessageLine))


async def test_deleting_says_how_much_room_only_the_session_itself_takes(
    session_maker, run_app, tmp_path, until
):
    session = session_maker(tmp_path / "s", "mine", 3)
    for file in (session.journal_file, session.samples_file):
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("PRAGMA journal_mode = DELETE")  # readers then make no files beside it
    own, shared = session.checkpoints / "own", tmp_path / "shared"
    shared.write_bytes(bytes(2_000_000))
    (session.checkpoints / "shared").hardlink_to(shared)
    async with run_app(None, root=session.folder.parent) as (app, pilot):
        await until(pilot, lambda: app.screen.query_one(Table).count() == 1)
        for size in (0, 5_000_000):
            own.write_bytes(bytes(size))
            usage = session.disk_usage()
            assert (usage.size - usage.freed, usage.freed > 5_000_000) == (2_000_000, size > 0)
            await pilot.press("d")
            await until(pilot, lambda u=usage: freed(u) in text_of_dialog(app), freed(usage))
            await pilot.press("escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)


@pytest.mark.parametrize("command", ["demo", "init my-run.yaml", "run my-run.yaml"])
async def test_an_empty_folder_says_what_starts_a_run(run_app, tmp_path, until, command):
    async with run_app(None, root=tmp_path / "none") as (app, pilot):
        empty = app.screen.query_one(Table).empty
        await until(pilot, lambda: any(f"rlhf-tui {command}" in p for r in empty() for p, _ in r))


async def test_screens_of_a_session_need_one(run_app):
    async with run_app(None) as (app, pilot):
        await pilot.press("2")
        assert app.current_mode == "sessions"


async def test_a_session_that_is_not_there_is_named(run_app, until):
    async with run_app("nobody") as (app, pilot):
        await until(pilot, lambda: notices(app))
        assert "nobody" in str(notices(app))
        assert app.current_mode == "sessions"


@pytest.mark.parametrize("key", ["S", "b", "m", "question_mark"])
async def test_a_key_on_its_way_to_a_dialog_that_closes_does_no_harm(run_app, engine, key, until):
    async with run_app() as (app, pilot):
        await pilot.press(key)
        await until(pilot, lambda: len(app.screen_stack) == 2)
        dialog = app.screen
        for _ in range(3):
            dialog.post_message(Key("escape", None))
            dialog.action_cancel()
            dialog.dismiss()
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.pause()
        assert app.is_running


def burst(app, *keys):
    """Keys that arrive together, as quick typing does over a slow connection."""
    for key in keys:
        character = {"backspace": "\x7f", "enter": "\r", "full_stop": "."}.get(key, key)
        app.post_message(Key(key, character))


async def test_what_is_typed_ahead_goes_into_the_dialog(run_app, engine, until):
    async with run_app() as (app, pilot):
        burst(app, "b", "1", "full_stop", "5")
        await until(pilot, lambda: isinstance(app.screen, InputDialog))
        await until(pilot, lambda: app.screen.query_one("#field").value == "1.5")
        assert app.current_mode == "dashboard"


async def test_a_burst_of_backspaces_and_text_keeps_its_order(run_app, engine, until):
    async with run_app() as (app, pilot):
        await pilot.press("b")
        burst(app, *["backspace"] * 4, "0", "full_stop", "2", "backspace", "3")
        await until(pilot, lambda: app.screen.query_one("#field").value == "0.3")


async def test_a_note_typed_in_one_go_is_sent_whole(run_app, engine, until):
    async with run_app() as (app, pilot):
        burst(app, *"wpause q", "enter")
        await until(pilot, lambda: engine == [Note(text="pause q")])
        assert app.is_running
