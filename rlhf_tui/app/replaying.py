"""The keys of a replay: pause, speed, and jumps from marker to marker."""

from typing import TYPE_CHECKING

from textual.binding import Binding, BindingType

from rlhf_tui.screens.context import Say
from rlhf_tui.state.replay.player import Player

if TYPE_CHECKING:  # only a replay imports it: start-up stays short
    from rlhf_tui.state.replay.feed import ReplayFeed

BINDINGS: list[BindingType] = [
    # With priority: in a list the key would turn a page.
    Binding("space", "replay_toggle", "pause/play", priority=True),
    Binding("left_square_bracket", "replay_speed(-1)", "slower"),
    Binding("right_square_bracket", "replay_speed(1)", "faster"),
    Binding("left_curly_bracket", "replay_marker(-1)", "previous marker"),
    Binding("right_curly_bracket", "replay_marker(1)", "next marker"),
]
"""The keys of the app whose actions call :class:`ReplayControls`."""
ACTIONS = ("replay_toggle", "replay_speed", "replay_marker")
"""The actions of :data:`BINDINGS`; without a replay there are none."""


class ReplayControls:
    """What the keys do to a replay."""

    def __init__(self, player: Player, feed: "ReplayFeed", say: Say) -> None:
        """Of one replay; `say` shows a notice."""
        self._player = player
        self._feed = feed
        self._say = say

    def toggle(self) -> None:
        """Pauses the replay, or plays on."""
        self._player.toggle()

    def change_speed(self, by: int) -> None:
        """Plays faster (1) or slower (-1)."""
        self._player.change_speed(by)

    def jump(self, way: int) -> None:
        """Moves to the next marker (1) or to the previous one (-1), and shows what it is."""
        marker = self._feed.jump(way)
        if marker is None:
            self._say(f"there is no {'later' if way > 0 else 'earlier'} marker")
        else:
            by = f" by {marker.who}" if marker.who else ""
            self._say(f"step {marker.step}: {marker.text}{by}")
