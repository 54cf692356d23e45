"""The turns of responses that do not wait for each other, as engines take them."""

import threading
import time
from collections.abc import Collection

from engine.protocol.rollout.messages import NextTurn


class TurnQueue:
    """A turn is *ready* until an engine takes it, and *taken* until the engine has generated it.

    Then its response has no turn here, until the next one is ready or the response ends.
    """

    def __init__(self, turns: list[NextTurn]) -> None:
        """Begins with the first turn of each response."""
        self.lock = threading.RLock()
        self.idle_seconds = 0.0
        """How long no turn was taken because all environments were being waited for."""
        self._changed = threading.Condition(self.lock)
        self._open = {turn.row for turn in turns}
        """Responses that go on."""
        self._ready = {turn.row: turn for turn in turns}
        self._taken: dict[int, NextTurn] = {}
        self._released: set[int] = set()
        """Responses whose engine is gone, or has been replaced: any engine may take their turns."""
        self._idle_since: float | None = None

    def take(self, rows: range, at_most: int, *, wait: bool) -> list[NextTurn] | None:
        """See :class:`TurnSource`."""
        with self.lock:
            while True:
                allowed = [*rows, *sorted(self._released.difference(rows))]
                if self._open.isdisjoint(allowed):
                    return None
                ready = [row for row in allowed if row in self._ready][:at_most]
                if ready or not wait:
                    break
                self._changed.wait()
            turns = [self._ready.pop(row) for row in ready]
            self._taken.update((turn.row, turn) for turn in turns)
            if turns:
                self._count_idle_time()
            return turns

    def release(self, rows: range, taken: Collection[int]) -> None:
        """See :class:`TurnSource`."""
        with self.lock:
            self._ready |= {row: self._taken.pop(row) for row in taken}
            self._released.update(rows)
            self._changed.notify_all()

    def remove(self, row: int) -> None:
        """Removes a turn that has been generated."""
        with self.lock:
            del self._taken[row]
            if not self._taken:
                self._idle_since = time.perf_counter()

    def put(self, turn: NextTurn) -> None:
        """Makes the next turn of a response ready."""
        with self.lock:
            self._ready[turn.row] = turn
            self._changed.notify_all()

    def end(self, rows: Collection[int]) -> None:
        """Ends responses, whose turns are then no longer needed."""
        with self.lock:
            self._open.difference_update(rows)
            if not self._open:
                self._count_idle_time()
            self._changed.notify_all()

    def _count_idle_time(self) -> None:
        if self._idle_since is not None:
            self.idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None
