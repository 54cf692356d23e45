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


def create_screen(mode: str) -> Screen[Any]:
    """Returns a new screen. Its module is imported at first use, which keeps start-up short."""
    module = importlib.import_module(f"rlhf_tui.screens.{mode}")
    screen: Screen[Any] = getattr(module, MODES[mode])()
    return screen
