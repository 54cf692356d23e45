"""The command palette: what it finds, how it describes it, and keys that arrive in a burst."""

import pytest
from textual.binding import Binding
from textual.command import CommandPalette
from textual.events import Key
from textual.widgets import Input, OptionList

from rlhf_tui.app import palette
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.modes import MODES, screen_class


def commands(app):
    return list(palette.PaletteCommands(app.screen).commands())


async def titles_for(app, query):
    """The titles that a query finds, best first."""
    hits = [hit async for hit in palette.PaletteCommands(app.screen).search(query)]
    return [hit.text for hit in sorted(hits, key=lambda hit: -hit.score)]


def burst(app, *keys):
    """Keys that arrive together, as held keys do over a slow connection."""
    for key in keys:
        app.post_message(Key(key, {"enter": "\r"}.get(key)))


@pytest.mark.parametrize("keys", [("ctrl+p", "enter"), ("ctrl+p", "enter", "enter", "escape")])
async def test_palette_keys_in_a_burst_leave_the_app_running(run_app, until, keys):
    async with run_app() as (app, pilot):
        burst(app, *keys * 4)
        await pilot.pause(0.2)
        for _ in range(10):  # what is open now can be closed again, and nothing below it is lost
            await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.is_running
        assert app.current_mode == "dashboard"


async def test_enter_twice_runs_a_command_once(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("ctrl+p")
        await until(pilot, lambda: CommandPalette.is_open(app))
        app.screen.query_one(Input).value = "switch between dark"
        await until(pilot, lambda: app.screen.query_one("CommandList").option_count == 1)
        burst(app, "enter", "enter", "enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await until(pilot, lambda: app.theme != "dark")
        await pilot.pause(0.1)
        assert app.theme == "light"


FOUND = {
    "fork": "Checkpoints: fork", "roll back": "Checkpoints: roll back", "kl coefficient": "Beta",
    "learning rate": "Set", "reward hacking": "Samples: hack", "light": "Theme: light",
}  # fmt: skip
"""Words that an operator types → a title among those that they find."""


async def test_commands_of_all_screens_are_found_by_the_words_for_them(make_app, running):
    app = make_app()
    async with running(app):
        for query, title in FOUND.items():
            assert title in await titles_for(app, query)
        assert commands(app)[0].title == "Help"  # enter alone runs the first one
        titles = [command.title for command in commands(app)]
        assert len(titles) == len(set(titles))  # also of an action with several keys


@pytest.mark.parametrize(
    ("query", "first"), [("kl", "KL"), ("rate", "learning rate"), ("stop", "Stop")]
)
async def test_commands_that_have_the_words_are_before_those_that_have_their_letters(
    make_app, running, query, first
):
    app = make_app()
    async with running(app):
        found = {command.title: f"{command.title}: {command.help}" for command in commands(app)}
        best = (await titles_for(app, query))[0]
        assert first in found[best]


async def test_the_palette_neither_lists_itself_nor_names_a_key_that_the_footer_does_not(
    make_app, running
):
    app = make_app()
    async with running(app):
        listed = {command.title: command.help for command in commands(app)}
        assert "Palette" not in listed
        assert listed["Detach"].endswith("key q")


async def test_a_command_of_another_screen_goes_there_and_names_its_key(run_app, until):
    async with run_app() as (app, pilot):
        (command,) = [c for c in commands(app) if c.title == "Checkpoints: roll back"]
        await command.run()
        await until(pilot, lambda: app.current_mode == "checkpoints")
        await until(pilot, lambda: "r here" in app.screen.query_one("#keys").text())


async def test_sorting_sessions_is_not_described_by_the_columns_of_samples(make_app, running):
    app = make_app()
    async with running(app):
        (command,) = [c for c in commands(app) if c.title == "Sessions: sort"]
        assert "score" not in command.help


@pytest.mark.parametrize(("mode", "panels"), [("dashboard", True), ("checkpoints", False)])
async def test_the_next_panel_is_a_command_where_there_are_several(run_app, until, mode, panels):
    async with run_app() as (app, pilot):
        await pilot.press(str(list(MODES).index(mode) + 1))
        await until(pilot, lambda: app.current_mode == mode)
        assert ("Next panel" in [command.title for command in commands(app)]) == panels


@pytest.mark.parametrize("mode", MODES)
def test_no_screen_takes_a_key_of_the_app(mode):
    of_app = {b.key for b in Binding.make_bindings(RlhfApp.BINDINGS)}
    of_screen = {b.key for b in Binding.make_bindings(screen_class(mode).BINDINGS)}
    assert not of_app & of_screen


def test_every_key_with_words_is_described():
    owners = [RlhfApp, *map(screen_class, MODES)]
    bindings = [b for owner in owners for b in Binding.make_bindings(owner.BINDINGS)]
    missing = {b.action for b in bindings if b.description and not b.system}
    assert missing - palette.DESCRIPTIONS.keys() == set()


async def test_without_colours_the_selected_command_is_underlined(
    make_app, running, monkeypatch, until
):
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app()
    async with running(app) as pilot:
        await pilot.press("ctrl+p")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette))
        found = app.screen.query_one(OptionList)
        await until(pilot, lambda: found.highlighted == 0)

        def underlined(command):
            """Whether each line of a command has this attribute throughout."""
            lines = [found.render_line(2 * command + i) for i in range(2)]
            return [all(s.style is not None and s.style.underline for s in line) for line in lines]

        await until(pilot, lambda: underlined(0) == [True, True])
        assert underlined(1) == [False, False]
