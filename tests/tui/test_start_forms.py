"""The forms that start runs: overrides are checked while they are typed, and nothing is left."""

import contextlib
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from textual.widgets import Input

from engine.journal.writer import JournalWriter
from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.app.forms.overrides import FormError, check_config_file, split_overrides
from rlhf_tui.app.forms.start import resume_form
from rlhf_tui.cli import cli
from rlhf_tui.dialogs.form import FormDialog
from rlhf_tui.state.messages import CommandResult
from rlhf_tui.widgets.completing_input import KeySuggester, completions
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.table import Table


@pytest.fixture
def seat(session_maker, tmp_path, monkeypatch, running, until):
    """The app on a session of three steps, which writes down the commands it would run."""
    session_maker(tmp_path / "sessions", "frozen", 50)

    @contextlib.asynccontextmanager
    async def open_app(name="frozen", size=(120, 40)):
        app = RlhfApp(tmp_path / "sessions", name, now=lambda: 1_700_003_600.0, follow=False)
        app.ran = []
        monkeypatch.setattr(
            app.engines, "run_cli", lambda arguments: app.ran.append(arguments) or CommandResult()
        )
        async with running(app, size) as pilot:
            if name is None:
                await until(pilot, lambda: app.screen.query_one(Table).count() == 1)
            yield app, pilot

    return open_app


def tone(app):
    return {tone for row in app.screen.query_one("#effect").rows(80, 4) for _, tone in row}


def effect(app):
    return app.screen.query_one("#effect").text().replace("\n", " ").strip()


async def form(app, pilot, until, key):
    await pilot.press(key)
    await until(pilot, lambda: isinstance(app.screen, FormDialog))


async def test_r_on_the_dashboard_of_a_finished_run_resumes_it_with_other_settings(seat, until):
    async with seat() as (app, pilot):
        await form(app, pilot, until, "r")
        assert effect(app) == "its 50 steps are done; train.steps=100 extends the run"
        assert tone(app) == {"dim"}
        app.screen.query_one("#overrides", Input).value = "train.steps=10"
        fewer = "its 10 steps are done; train.steps=100 extends the run"
        await until(pilot, lambda: effect(app) == fewer)
        app.screen.query_one("#overrides", Input).value = ""
        await pilot.press(*"train.steps=100 kl.beta=0.3")
        await until(pilot, lambda: effect(app) == "kl.beta 0.05 → 0.3, train.steps 50 → 100")
        await pilot.press("enter")
        await until(pilot, lambda: app.ran)
        options = ["-o", "train.steps=100", "-o", "kl.beta=0.3", "--detach"]
        assert app.ran == [["resume", "frozen", *options]]


@contextlib.contextmanager
def locked(session):
    """The session with an engine, as others see it."""
    lock = session.acquire()
    session.write_engine(str(session.folder / "engine.sock"), "test")
    yield
    lock.release()


@pytest.fixture
def starting(session_maker, tmp_path, monkeypatch, running):
    """The app whose start of a run named `new` lasts, and what makes sessions beside it."""
    root = tmp_path / "sessions"
    session_maker(root, "one", 3)

    @contextlib.asynccontextmanager
    async def start():
        app = RlhfApp(root, None, now=lambda: 1_700_003_600.0, follow=False)
        ended = threading.Event()
        monkeypatch.setattr(app.engines, "run_cli", lambda _words: ended.wait() and CommandResult())
        async with running(app) as pilot:
            app.engines.start(["demo", "--name", "new"], "new")
            yield app, pilot, lambda name: session_maker(root, name, 3), ended
            ended.set()

    return start


@pytest.mark.parametrize(
    ("state", "message", "told", "status"),
    [
        ("stopped", "stopped at once", "stopped at once", "stopped at once"),
        ("failed", "out of memory", "failed: out of memory", "failed (out of memory)"),
    ],
)
def test_how_a_run_ended_is_told_once(session_maker, tmp_path, state, message, told, status):
    session = session_maker(tmp_path, "ended", 50)
    journal = JournalWriter(session)
    journal.set_meta(state=state, message=message)
    journal.close()
    form = resume_form(tmp_path, "ended", None)
    assert [(f"It {told}", "warn")] in form.dialog.rows
    shown = CliRunner().invoke(cli, ["status", "ended", "--sessions", str(tmp_path)]).output
    assert shown.splitlines()[0] == f"ended: {status}"


@pytest.mark.parametrize(("step", "words"), [(49, "1 step is redone"), (40, "10 steps are redone")])
def test_a_resume_says_how_many_steps_are_redone(session_maker, tmp_path, step, words):
    session_maker(tmp_path, "ended", 50)
    rows = resume_form(tmp_path, "ended", step).dialog.rows
    assert rows[0][0][0].endswith(f"its checkpoint of step {step}; {words}.")


async def test_a_new_run_is_opened_once_its_engine_lives_and_no_other_one(starting, until):
    async with starting() as (app, pilot, make, _):
        table = app.screen.query_one(Table)
        other, new = make("another"), make("new")
        with locked(other):
            await until(pilot, lambda: table.count() == 3)
            assert app.current_mode == "sessions"
            with locked(new):
                await until(pilot, lambda: app.current_mode == "dashboard")
                assert app.state.name == "new"


@pytest.fixture
def looked(monkeypatch):
    """Collects the sessions that are looked at, each with whether it may be live."""
    found, look = [], SessionFolder.may_be_live

    def record(session):
        found.append((session.name, live := look(session)))
        return live

    monkeypatch.setattr(SessionFolder, "may_be_live", record)
    return found


async def test_a_fork_is_not_opened_while_it_is_copied(starting, until, looked):
    async with starting() as (app, pilot, make, _):
        new = make("new")
        copying = new.acquire()
        await until(pilot, lambda: looked.count(("new", True)) > 2)
        assert app.current_mode == "sessions"
        copying.release()
        with locked(new):
            await until(pilot, lambda: app.current_mode == "dashboard")


async def test_a_new_run_does_not_take_the_keys_that_are_typed_into_a_dialog(
    starting, until, looked
):
    async with starting() as (app, pilot, make, ended):
        await form(app, pilot, until, "N")
        with locked(make("new")):
            await until(pilot, lambda: ("new", True) in looked)
            ended.set()
            footer = app.screen_stack[0].query_one(KeyFooter)
            await until(pilot, lambda: "'new' is running" in footer.text())
            await pilot.press(*"pc")
            assert app.current_mode == "sessions"
            assert app.screen.query_one("#path", Input).value == "pc"


async def test_no_scrollbar_takes_the_only_line_of_a_field(seat, until):
    async with seat(size=(80, 24)) as (app, pilot):
        await form(app, pilot, until, "r")
        assert app.screen.query_one("#overrides", Input).styles.scrollbar_size_horizontal == 0


WRONG = {
    "kl.bta=1": "unknown key 'kl.bta'; did you mean 'kl.beta'?",
    "kl.beta=low": "kl.beta must be",
    "model.policy=x": "model.policy cannot change on a resume",
    "beta 1": "type key=value",
}


async def test_a_wrong_override_is_explained_at_once_and_starts_nothing(seat, until):
    async with seat() as (app, pilot):
        await form(app, pilot, until, "r")
        for typed, words in WRONG.items():
            app.screen.query_one(Input).value = f"train.steps=100 {typed}"
            await until(pilot, lambda words=words: words in effect(app), words)
            assert tone(app) == {"warn"}
        await pilot.press("enter", "escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.ran == []


async def test_a_fork_gets_its_overrides_and_tab_completes_a_key(seat, until, monkeypatch):
    async with seat(None) as (app, pilot):
        app.engines.ask_fork("frozen", 25)
        await until(pilot, lambda: isinstance(app.screen, FormDialog))
        await pilot.press("tab", "k")
        field = app.screen.query_one("#overrides", Input)
        suggested = KeySuggester({"kl.beta": "0.05"})
        assert await suggested.get_suggestion("a=1 k") == "a=1 kl.beta="
        assert await suggested.get_suggestion("kl.beta=") == "kl.beta=0.05"
        await until(pilot, lambda: app.screen.focused is field)
        await pilot.pause(0.1)
        await pilot.press("tab", *"0.2", "enter")
        await until(pilot, lambda: app.ran)
        named = ["--from", "25", "--name", "frozen-fork", "-o", "kl.beta=0.2", "--detach"]
        assert app.ran == [["fork", "frozen", *named]]


async def test_typing_replaces_the_name_that_a_fork_is_offered(seat, until):
    async with seat(None) as (app, pilot):
        app.engines.ask_fork("frozen", 25)
        await until(pilot, lambda: isinstance(app.screen, FormDialog))
        await until(pilot, lambda: app.screen.focused is not None)
        await pilot.press(*"mine", "enter")
        await until(pilot, lambda: app.ran)
        assert app.ran == [["fork", "frozen", "--from", "25", "--name", "mine", "--detach"]]


async def test_a_fork_from_the_last_step_asks_for_more_steps(seat, until):
    async with seat(None) as (app, pilot):
        app.engines.ask_fork("frozen", 50)
        await until(pilot, lambda: isinstance(app.screen, FormDialog))
        await until(pilot, lambda: app.screen.query("#effect"))
        words = "its 50 steps are done; train.steps=100 trains the fork further"
        await until(pilot, lambda: effect(app) == words)
        await pilot.press("enter")
        app.screen.query_one("#overrides", Input).value = "train.steps=100"
        await until(pilot, lambda: effect(app) == "train.steps 50 → 100")
        assert app.ran == []


async def test_a_run_is_started_from_a_file_whose_path_is_completed(
    seat, until, tmp_path, root, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run.yaml").write_text((root / "frozen" / "config.yaml").read_text())
    async with seat(None) as (app, pilot):
        await form(app, pilot, until, "N")
        await pilot.press("m", "y")
        await until(pilot, lambda: effect(app) == "continue with  my run.yaml")
        assert tone(app) == {"dim"}
        await pilot.press("enter")
        await until(pilot, lambda: tone(app) == {"warn"}, "a warning that nothing is started")
        await pilot.pause(0.1)
        await pilot.press("tab")
        await until(pilot, lambda: "200 steps, folder:" in effect(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.ran)
        words = ["run", str(tmp_path / "my run.yaml"), "--name", "my-run", "--detach"]
        assert app.ran == [words]


async def test_tab_completes_the_keys_and_values_of_the_file_of_a_new_run(
    seat, until, tmp_path, root, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (root / "frozen" / "config.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text)
    async with seat(None) as (app, pilot):
        await form(app, pilot, until, "N")
        app.screen.query_one("#path", Input).value = "run.yaml"
        await until(pilot, lambda: "200 steps, folder:" in effect(app))
        field = app.screen.query_one("#overrides", Input)
        assert await field.suggester.get_suggestion("kl.be") == "kl.beta="
        assert await field.suggester.get_suggestion("kl.target=") == "kl.target=6.0"
        app.screen.query_one("#path", Input).value = "none.yaml"
        await until(pilot, lambda: "no configuration file" in effect(app))
        assert await field.suggester.get_suggestion("kl.be") is None


async def test_a_path_that_cannot_be_looked_at_is_told_in_the_form(seat, until):
    async with seat(None) as (app, pilot):
        await form(app, pilot, until, "N")
        app.screen.query_one("#path", Input).value = "x" * 300  # such as a text pasted by mistake
        await until(pilot, lambda: "File name too long" in effect(app))
        assert isinstance(app.screen, FormDialog)


@pytest.mark.parametrize(
    ("text", "words"),
    [("kl: {bta: 1}", "unknown key 'kl.bta'"), ("- 1", "must contain sections"),
     ("a: [", "line 1"), (None, "no configuration file at")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_explained_in_a_line(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FormError) as caught:
        check_config_file(tmp_path / "sessions", str(path), "", [])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sessions").exists()


def test_the_starters_configuration_is_given_by_its_name(tmp_path):
    effect = check_config_file(tmp_path / "sessions", "starter:demo", "", ["train.steps=7"])
    assert effect.startswith("7 steps")
    assert str(tmp_path / "sessions" / "demo") in effect


def test_values_with_spaces_are_quoted():
    assert split_overrides("a.b='x y' c=1") == ["a.b=x y", "c=1"]
    with pytest.raises(FormError, match="quote"):
        split_overrides("a='x")


def test_paths_complete_to_folders_and_yaml_files(tmp_path):
    for name in ("run-a.yaml", "run-b.yml", "run.txt", ".run.yaml", "run\x1b[2J.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    assert completions(f"{tmp_path}/ru") == ["run-a.yaml", "run-b.yml", "runs/"]
    assert completions(str(Path(tmp_path, "none", "x"))) == []
