"""The keys of the sessions screen act on the highlighted session, whichever one is open."""

import contextlib

import pytest
from textual.events import Key

from engine.journal.writer import JournalWriter
from engine.protocol.commands import Note, Pause, SetBeta, Stop, Unpause
from engine.session.engine_info import EngineInfo
from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.base import ChoiceDialog, InputDialog
from rlhf_tui.screens import base
from rlhf_tui.screens.parts import engine_waits
from rlhf_tui.state import command_sender
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.table import Table
from tests.tui.screen import cells, notices, press_for

STEPS = 3


@pytest.fixture
def two_runs(session_maker, tmp_path, running, until, monkeypatch):
    """The app with `one` open, and the sessions screen with `two` highlighted."""
    root = tmp_path / "sessions"
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(root))
    for name in ("one", "two"):
        session_maker(root, name, STEPS)

    @contextlib.asynccontextmanager
    async def open_app(**options):
        app = RlhfApp(root, "one", now=lambda: 1_700_003_600.0, follow=False, **options)
        async with running(app) as pilot:
            await pilot.press("1")
            table = app.screen.query_one(Table)
            await until(pilot, lambda: table.count() == 2)
            await pilot.press("g" if table.keys[0] == "two" else "G")
            await until(pilot, lambda: table.key == "two")
            yield app, pilot

    return open_app


@pytest.fixture
def addressed(engine, monkeypatch):
    """The names of the sessions that commands were sent to."""
    names, kind = [], command_sender.Client
    send = kind.send

    def record(self, command, command_id):
        names.append(self.session.name)
        return send(self, command, command_id)

    monkeypatch.setattr(kind, "send", record)
    return names


@pytest.fixture
def only_one_lives(monkeypatch):
    """`one` has an engine, `two` has none."""
    info = EngineInfo(pid=4242, host="box", socket="nowhere", version="1")
    monkeypatch.setattr(SessionFolder, "is_live", lambda self: self.name == "one")
    monkeypatch.setattr(SessionFolder, "engine", lambda self: info)


async def test_p_pauses_the_highlighted_run_and_not_the_open_one(
    two_runs, engine, addressed, until
):
    async with two_runs() as (app, pilot):
        await pilot.press("p")
        await until(pilot, lambda: addressed == ["two"])
        assert engine == [Pause()]
        assert app.session.name == "one"
        footer = app.screen.query_one(KeyFooter)
        await until(pilot, lambda: "two: paused" in footer.text(), "the notice")


async def test_a_run_that_takes_no_steps_says_what_it_waits_for(
    two_runs, engine, monkeypatch, until
):
    monkeypatch.setattr(engine_waits, "awaited", lambda session: f"room for {session.name}")
    async with two_runs() as (app, pilot):
        for name in ("one", "two"):
            with contextlib.closing(JournalWriter(SessionFolder(app.root / name))) as journal:
                journal.set_meta(state="running")
        app.screen.read_sessions()
        table = app.screen.query_one(Table)
        await until(pilot, lambda: "⧗" in cells(table, 0) and "⧗" in cells(table, 1))
        assert "waiting" in cells(table, 0)
        assert "waits for room for two" in app.screen.query_one("#about").text()


async def test_a_pause_of_one_run_does_not_count_for_another(two_runs, engine, addressed, until):
    async with two_runs() as (app, pilot):
        other = "G" if app.screen.query_one(Table).keys[0] == "two" else "g"
        await pilot.press("p", "p", other, "p")
        await until(pilot, lambda: addressed == ["two", "two", "one"])
        assert engine == [Pause(), Unpause(), Pause()]


@pytest.mark.parametrize(
    ("keys", "kind", "title", "command"),
    [
        (["S", "s"], ChoiceDialog, "Stop two?", Stop()),
        (["b", *"0.2", "enter"], InputDialog, "Set beta of two", SetBeta(value=0.2)),
        (["w", *"odd", "enter"], InputDialog, "Add a note to two", Note(text="odd")),
    ],
)
async def test_a_dialog_names_the_run_that_it_acts_on(
    two_runs, engine, addressed, keys, kind, title, command, until
):
    async with two_runs() as (app, pilot):
        await press_for(pilot, kind, keys[0])
        assert app.screen.heading == title
        await pilot.press(*keys[1:])
        await until(pilot, lambda: engine == [command])
        assert addressed == ["two"]


async def test_the_footer_offers_what_can_act_on_the_highlighted_run(
    two_runs, only_one_lives, until
):
    async with two_runs() as (app, pilot):
        footer = app.screen.query_one(KeyFooter)
        assert "r resume" in footer.text()
        assert "p pause" not in footer.text()
        await pilot.press("G" if app.screen.query_one(Table).keys[0] == "two" else "g")
        await until(pilot, lambda: "p pause" in footer.text())
        assert "r resume" not in footer.text()


async def test_a_key_that_cannot_act_on_the_highlighted_run_says_why(
    two_runs, only_one_lives, until
):
    async with two_runs() as (app, pilot):
        await pilot.press("p")
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["'two' has no engine; resume it: rlhf-tui resume two"]


async def test_a_run_that_cannot_be_read_is_not_offered_to_be_resumed(two_runs, tmp_path, until):
    (tmp_path / "sessions" / "two" / "journal.db").write_bytes(b"not a database" * 99)
    async with two_runs() as (app, pilot):
        footer = app.screen.query_one(KeyFooter)
        await until(pilot, lambda: "resume" not in footer.text())
        assert "delete" in footer.text()
        for key in ("r", "f"):
            await pilot.press(key)
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["'two' cannot be read: rlhf-tui verify two says what is wrong"]


async def test_read_only_each_key_of_the_screen_says_so(two_runs, until):
    async with two_runs(read_only=True) as (app, pilot):
        assert "delete" not in app.screen.query_one(KeyFooter).text()
        for key in ("n", "r", "f", "d"):
            app.clear_notifications()
            await until(pilot, lambda: not notices(app))
            await pilot.press(key)
            await until(pilot, lambda: notices(app))
            assert notices(app) == ["read-only: nothing can be started or deleted"]


async def test_keys_typed_before_the_list_is_read_act_on_its_rows(
    session_maker, tmp_path, until, monkeypatch
):
    monkeypatch.setattr(base, "FIRST_ROWS_TIMEOUT", 60.0)
    root = tmp_path / "sessions"
    for name in ("one", "two"):
        session_maker(root, name, STEPS)
    app = RlhfApp(root, None, now=lambda: 1_700_003_600.0, follow=False)
    async with app.run_test() as pilot:
        app.post_message(Key("G", "G"))
        app.post_message(Key("enter", "\r"))
        await until(pilot, lambda: app.session is not None, "an open session")


async def test_a_run_whose_lock_cannot_be_looked_at_is_not_steered_and_says_why(
    two_runs, tmp_path, until
):
    session = SessionFolder(tmp_path / "sessions" / "two")
    lock = session.acquire()
    session.write_engine("nowhere", "1")
    async with two_runs() as (app, pilot):
        await press_for(pilot, InputDialog, "w", *"hi")
        lock.release()
        session.lock_file.unlink()
        session.lock_file.symlink_to(session.lock_file)
        await pilot.press("enter")
        await until(pilot, lambda: notices(app))
        assert "cannot tell whether an engine holds" in notices(app)[0]
