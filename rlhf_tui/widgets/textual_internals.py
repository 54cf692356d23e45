"""Every use of a private part of Textual, each with its reason.

tests/tui/test_textual_internals.py fails when Textual changes one of them.
"""

from typing import Any

from textual.app import App
from textual.binding import Binding
from textual.dom import DOMNode
from textual.screen import Screen


async def run_key_binding(app: App[Any], key: str) -> bool:
    """Runs the binding of a key now, as Textual would later; False if the key has no binding.

    Textual has no public way to run a binding before the event loop handles the next key:
    `App.simulate_key` appends the key to the queue.
    """
    return await app._check_bindings(key, priority=True) or await app._check_bindings(key)


def bindings_of_key(node: DOMNode, key: str) -> list[Binding]:
    """The bindings of a node itself for a key, including those of its base classes.

    `Screen.active_bindings` has one binding per key, which may be that of a parent.
    """
    return list(node._bindings.key_to_bindings.get(key, ()))


async def wait_until_mounted(screen: Screen[Any]) -> None:
    """Waits until a screen can take keys.

    `push_screen` returns an awaitable, but an action that is run by name does not pass it on.
    """
    await screen._mounted_event.wait()


def screens_of_all_modes(app: App[Any]) -> list[Screen[Any]]:
    """All screens of all modes. `App.screen_stack` has only those of the current mode."""
    return [screen for stack in app._screen_stacks.values() for screen in stack]


def screens_of_current_mode(app: App[Any]) -> list[Screen[Any]]:
    """The screens of the current mode, bottom first; empty before the first one is created.

    `App.screen_stack` raises KeyError while the mode is being switched, and after the app exits.
    """
    return list(app._screen_stacks.get(app.current_mode, []))
