"""The clock of a replay: its position, whether it plays, and its speed."""

import threading
import time
from collections.abc import Callable

from msgspec import Struct

SPEEDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
"""The speeds of the keys. A replay may start with another one."""


class ReplayOptions(Struct, frozen=True):
    """How a replay begins."""

    speed: float = 20.0
    """Seconds of the recording in a second."""
    from_step: int = 0
    """The step of today's timeline at whose end the replay begins."""


class Player:
    """Advances the offset in a recording. The app and the feed use it from their threads."""

    def __init__(self, speed: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Plays from offset 0 once :meth:`load` has set the length of the recording.

        Args:
            speed: seconds of the recording in a second.
            clock: returns seconds; only differences count.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._speed = speed
        self._duration = 0.0
        self._playing = True
        self._offset = 0.0
        """When :attr:`_since` was."""
        self._since = clock()
        self.changed = threading.Event()
        """Set by everything but the passing of time."""

    def load(self, duration: float, offset: float) -> None:
        """Begins to play a recording of `duration` seconds, from an offset."""
        with self._lock:
            self._duration = duration
            self._go(offset)

    def read(self) -> tuple[float, float, bool]:
        """The offset, the speed, and whether time passes, read together."""
        with self._lock:
            now = self._now()
            return now, self._speed, self._playing and now < self._duration

    def _now(self) -> float:
        passed = (self._clock() - self._since) * self._speed if self._playing else 0.0
        return min(self._offset + passed, self._duration)

    def _go(self, offset: float) -> None:
        self._offset, self._since = min(max(offset, 0.0), self._duration), self._clock()
        self.changed.set()

    def seek(self, offset: float) -> None:
        """Continues at another offset."""
        with self._lock:
            self._go(offset)

    def toggle(self) -> None:
        """Pauses or continues. At the end it plays from the beginning."""
        with self._lock:
            now = self._now()
            self._playing = not self._playing or now >= self._duration
            self._go(0.0 if self._playing and now >= self._duration else now)

    def change_speed(self, by: int) -> None:
        """Plays at the next faster speed of :data:`SPEEDS` (1) or the next slower one (-1)."""
        with self._lock:
            now = self._now()
            if by > 0:
                self._speed = next((s for s in SPEEDS if s > self._speed), self._speed)
            else:
                self._speed = next((s for s in reversed(SPEEDS) if s < self._speed), self._speed)
            self._go(now)
