"""The keys of a replay: pause, speed, and jumps from marker to marker."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from textual.binding import Binding, BindingType

from rlhf_tui.screens.context import Say
from rlhf_tui.state.replay.player import Player

if TYPE_CHECKING:  # only a replay imports it: start-up stays short
    from rlhf_tui.state.replay.feed import ReplayFeed

BINDINGS: list[BindingType] = [
    # With priority: in a list the key would turn a page.
    Binding("space", "replay('toggle')", "pause/play", priority=True),
    Binding("left_square_bracket", "replay('slower')", "slower"),
    Binding("right_square_bracket", "replay('faster')", "faster"),
    Binding("left_curly_bracket", "replay('previous')", "previous marker"),
    Binding("right_curly_bracket", "replay('next')", "next marker"),
]
"""The keys of the app that call :meth:`ReplayControls.act`; without a replay there are none."""


class ReplayControls:
    """Carries out the keys of a replay."""

    def __init__(self, player: Player, feed: "ReplayFeed", say: Say) -> None:
        """Of one replay; `say` shows a notice."""
        self._feed = feed
        self._say = say
        self._actions: dict[str, Callable[[], None]] = {
            "toggle": player.toggle,
            "slower": lambda: player.change_speed(-1),
            "faster": lambda: player.change_speed(1),
            "previous": lambda: self._jump(-1),
            "next": lambda: self._jump(1),
        }

    def act(self, action: str) -> None:
        """Carries out the action of a key."""
        self._actions[action]()

    def _jump(self, way: int) -> None:
        """Moves to the next marker (1) or to the previous one (-1), and shows what it is."""
        marker = self._feed.jump(way)
        if marker is None:
            self._say(f"there is no {'later' if way > 0 else 'earlier'} marker")
        else:
            by = f" by {marker.who}" if marker.who else ""
            self._say(f"step {marker.step}: {marker.text}{by}")
