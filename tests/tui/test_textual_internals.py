"""The private parts of Textual that the app uses: one module names them, and they are there."""

import ast
from pathlib import Path

import pytest
from textual.app import App
from textual.binding import Binding
from textual.screen import ModalScreen, Screen
from textual.widgets import Input

import rlhf_tui
from rlhf_tui.widgets import textual_internals as internals

SOURCES = sorted(Path(rlhf_tui.__file__).parent.rglob("*.py"))
MODULE = Path(internals.__file__)


class Other(Screen):
    pass


class Probe(App):
    """Notes the bindings that were run."""

    MODES = {"one": Screen, "two": Other}
    DEFAULT_MODE = "one"
    BINDINGS = [Binding("a", "note('app')"), Binding("b", "note('first')", priority=True)]

    def __init__(self):
        super().__init__()
        self.noted = []

    def action_note(self, word):
        self.noted.append(word)


def foreign_private_names(path):
    """Names such as `x._y` where x is neither self nor cls."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            ours = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            if not ours and not node.attr.startswith("__"):
                yield node.attr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_private_parts_of_others_are_used_in_one_module_only(path):
    if path != MODULE:
        assert list(foreign_private_names(path)) == []


def test_the_module_uses_what_these_tests_check():
    assert set(foreign_private_names(MODULE)) == {
        "_check_bindings", "_bindings", "_mounted_event", "_screen_stacks",
    }  # fmt: skip


async def test_the_binding_of_a_key_runs_before_the_call_returns():
    app = Probe()
    async with app.run_test():
        assert await internals.run_key_binding(app, "a")
        assert await internals.run_key_binding(app, "b")
        assert app.noted == ["app", "first"]
        assert not await internals.run_key_binding(app, "z")


async def test_a_key_that_is_bound_to_nothing_here_is_not_run_under_a_dialog():
    app = Probe()
    async with app.run_test():
        await app.push_screen(ModalScreen())
        assert not await internals.run_key_binding(app, "a")


async def test_a_widget_s_bindings_are_found_by_key():
    app = Probe()
    async with app.run_test():
        actions = [b.action for b in internals.bindings_of_key(Input(), "backspace")]
        assert actions == ["delete_left"]
        assert internals.bindings_of_key(Input(), "x") == []


async def test_a_screen_that_was_pushed_is_waited_for():
    app = Probe()
    async with app.run_test():
        screen = Other()
        app.push_screen(screen)
        await internals.wait_until_mounted(screen)
        assert screen.is_mounted


async def test_screens_of_one_mode_and_of_all_modes():
    app = Probe()
    assert internals.screens_of_current_mode(app) == []
    async with app.run_test():
        first = app.screen
        await app.switch_mode("two")
        assert internals.screens_of_current_mode(app) == [app.screen]
        assert internals.screens_of_all_modes(app) == [first, app.screen]
