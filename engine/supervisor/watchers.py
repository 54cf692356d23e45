"""The clients that watch: each is sent the newest state, with updates merged.

Watchers are sent states, not a list of messages: the journal holds every row, and a newer phase or
telemetry replaces an older one that was not sent yet. Their cost therefore does not grow with the
number of steps or phases, and hardly with the number of watchers.
"""

import asyncio
from collections.abc import Callable, Hashable
from typing import Protocol

from engine.protocol import frames
from engine.protocol.client_messages import JournalAdvanced, Telemetry
from engine.protocol.rank_messages import Phase

FRAME_INTERVAL = 0.1
"""Minimum seconds between two frames to a watcher; updates in between are merged."""
FRAMES_PER_SECOND = 50
"""Maximum rate over all watchers, of steps, phases and telemetry. With more than five watchers each
gets them less often, but at least once per :data:`MAX_DELAY`. Each frame makes a watcher read the
journal, which takes milliseconds of processor time on the machine of the run."""
MAX_DELAY = 1.0
"""Seconds after which the newest steps and phases are sent, however many watch."""
ROWS_KEY = "rows"
"""The key of the state "new rows in the journal"."""


class Watcher(Protocol):
    """A connection to which frames are sent."""

    def is_behind(self) -> bool:
        """Whether it has not yet read everything that was sent."""

    def send_frame(self, frame: bytes) -> None:
        """Queues a frame."""


class Watchers:
    """Sends each watcher all updates since the last time in one frame.

    A watcher that does not read gets nothing more until it does, and then the newest state, so its
    queue never grows.
    """

    def __init__(self, journal_position: Callable[[], JournalAdvanced]) -> None:
        """`journal_position` returns the newest rows of the journal."""
        self._journal_position = journal_position
        self._sent: dict[Watcher, int] = {}
        """Each watcher, and the number of the newest state that it was sent."""
        self._states: dict[Hashable, tuple[int, Phase | Telemetry | None]] = {}
        """What there is to say, the newest last: by rank of a phase, type of a telemetry, or
        :data:`ROWS_KEY`, whose message is made when it is sent."""
        self._number = 0
        self._last_send = -MAX_DELAY
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """The number of watchers."""
        return len(self._sent)

    def __contains__(self, client: Watcher) -> bool:
        """Whether a client watches."""
        return client in self._sent

    @property
    def number(self) -> int:
        """The number of the newest state, for :meth:`add`."""
        return self._number

    def add(self, watcher: Watcher, after: int) -> None:
        """Sends a watcher the newest rows at once, and all updates from now on.

        Args:
            watcher: the connection.
            after: the value of :attr:`number` up to which the watcher already has the states, from
                a request.
        """
        self._sent[watcher] = after
        watcher.send_frame(frames.encode(self._journal_position()))
        if after < self._number:
            self._schedule(FRAME_INTERVAL)

    def discard(self, watcher: Watcher) -> None:
        """Sends nothing more to a client, whether it watches or not."""
        self._sent.pop(watcher, None)

    def set_state(self, message: Phase | Telemetry) -> None:
        """Sends a state that is not in the journal; it replaces an older one not sent yet."""
        key = message.rank if isinstance(message, Phase) else type(message)
        self._set(key, message)
        self._schedule(self._pace())

    def rows_added(self, *, soon: bool) -> None:
        """Announces new rows of the journal.

        Args:
            soon: whether to send within :data:`FRAME_INTERVAL`, however many watch: for events that
                people wait for, not for steps.
        """
        self._set(ROWS_KEY, None)
        self._schedule(FRAME_INTERVAL if soon else self._pace())

    def close(self) -> None:
        """Sends the last updates, and nothing afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._send()
        self._sent.clear()

    def _set(self, key: Hashable, message: Phase | Telemetry | None) -> None:
        self._number += 1
        self._states.pop(key, None)  # so that the newest is the last one
        self._states[key] = self._number, message

    def _pace(self) -> float:
        """Seconds between two frames of steps and phases."""
        return min(max(FRAME_INTERVAL, len(self._sent) / FRAMES_PER_SECOND), MAX_DELAY)

    def _schedule(self, pace: float) -> None:
        """Schedules the next frames `pace` seconds after the last ones."""
        if not self._sent:
            return
        loop = asyncio.get_running_loop()
        due = max(self._last_send + pace, loop.time() + FRAME_INTERVAL)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._send)

    def _send(self) -> None:
        self._timer = None
        self._last_send = asyncio.get_running_loop().time()
        made: dict[int, bytes] = {}  # most have been sent the same: encoded once
        behind = False
        for watcher, sent in self._sent.items():
            if sent == self._number:
                continue
            if watcher.is_behind():
                behind = True
                continue
            if sent not in made:
                made[sent] = self._frames_after(sent)
            watcher.send_frame(made[sent])
            self._sent[watcher] = self._number
        if behind:
            self._schedule(self._pace())

    def _frames_after(self, number: int) -> bytes:
        """The frames newer than a state, oldest first."""
        return b"".join(
            frames.encode(self._journal_position() if message is None else message)
            for when, message in self._states.values()
            if when > number
        )
