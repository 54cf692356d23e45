"""The table of screens: the keys 1 to 5, the tabs and the modes of the app are made from it."""

import importlib
from typing import Any

from textual.screen import Screen

MODES = {
    "sessions": "SessionsScreen",
    "dashboard": "DashboardScreen",
    "samples": "SamplesScreen",
    "checkpoints": "CheckpointsScreen",
    "log": "LogScreen",
}
"""Mode → class of its screen, in the order of the keys. A mode's module is `screens/<mode>.py`."""


def screen_class(mode: str) -> type[Screen[Any]]:
    """The class of a mode's screen. Its module is imported at first use: start-up stays short."""
    module = importlib.import_module(f"rlhf_tui.screens.{mode}")
    found: type[Screen[Any]] = getattr(module, MODES[mode])
    return found


def create_screen(mode: str) -> Screen[Any]:
    """Returns a new screen of a mode."""
    return screen_class(mode)()
