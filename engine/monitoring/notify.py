"""Sends notifications to operators outside the terminal, without ever delaying the training.

A channel is a class of the :class:`Channel` protocol in :mod:`engine.monitoring.channels`. To add
one, add it to :data:`CHANNELS` and declare its key in
:class:`~engine.config.sections.supervision.NotifyConfig`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from engine.config.rules.supervision import parse_quiet_hours
from engine.config.sections.supervision import NotifyConfig
from engine.monitoring.channels.command import CommandChannel
from engine.monitoring.channels.message import LEVELS, Notification, NotificationError
from engine.monitoring.channels.sendmail import EmailChannel
from engine.monitoring.channels.webhook import WebhookChannel

log = logging.getLogger("engine")

SEND_TIMEOUT = 30.0
"""Seconds for one message on one channel."""
FINISH_TIMEOUT = 40.0
"""Seconds that a finished engine waits for messages that are being sent."""
CANCEL_TIMEOUT = 2.0
"""Further seconds for messages that are then cancelled."""
HOUR = 3600.0


class Channel(Protocol):
    """A way to send notifications."""

    @property
    def name(self) -> str:
        """Its key in the configuration, for the log."""

    def missing_variables(self) -> list[str]:
        """The environment variables that it needs and that are not set."""

    async def send(self, message: Notification) -> None:
        """Sends one message. It may take any time: it is cancelled after :data:`SEND_TIMEOUT`.

        It runs in the supervisor's event loop, so it must not block.

        Raises:
            NotificationError: why it cannot be sent, without a secret.
        """


def _command(config: NotifyConfig) -> list[Channel]:
    return [CommandChannel(config.command)] if config.command else []


def _webhooks(config: NotifyConfig) -> list[Channel]:
    return [WebhookChannel(webhook, i) for i, webhook in enumerate(config.webhooks)]


def _email(config: NotifyConfig) -> list[Channel]:
    return [EmailChannel(config.email, config.sendmail)] if config.email else []


CHANNELS: dict[str, Callable[[NotifyConfig], list[Channel]]] = {
    "command": _command,
    "webhooks": _webhooks,
    "email": _email,
}
"""Key of `notify` → its channels."""


def open_channels(config: NotifyConfig) -> list[Channel]:
    """Creates the channels that a configuration names."""
    return [channel for opened in CHANNELS.values() for channel in opened(config)]


def missing_variables(channels: Sequence[Channel]) -> list[str]:
    """A sentence for each environment variable that a channel needs and that is not set."""
    return [
        f"{channel.name}: the environment variable {name} is not set, so nothing can be sent"
        for channel in channels
        for name in channel.missing_variables()
    ]


async def send(channel: Channel, message: Notification) -> None:
    """Sends a message within the time limit. Raises NotificationError."""
    try:
        await asyncio.wait_for(channel.send(message), SEND_TIMEOUT)
    except TimeoutError:
        raise NotificationError(f"it took more than {SEND_TIMEOUT:.0f} s") from None


class Notifier:
    """Decides which messages are sent, sends them, and logs the outcome of each."""

    def __init__(
        self,
        config: NotifyConfig,
        channels: Sequence[Channel] | None = None,
        *,
        root: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Sends nothing yet.

        Args:
            config: the `notify` section.
            channels: those of the configuration if None.
            root: the folder of sessions, for messages that say how to open theirs.
            now: the Unix time.
        """
        self._level = LEVELS.index(config.level)
        self._quiet = parse_quiet_hours(config.quiet_hours) if config.quiet_hours else None
        self._max_per_hour = config.max_per_hour
        self._root, self._now = root, now
        self.channels = list(open_channels(config) if channels is None else channels)
        # One message at a time and in order on each channel, or a slow one would accumulate them.
        self._locks = [asyncio.Lock() for _ in self.channels]
        self._tasks: set[asyncio.Task[None]] = set()
        self._alerts: deque[float] = deque()
        """Times of the alerts sent in the last hour."""
        self._unsent = 0
        """Alerts that the rate limit kept back since the last message."""

    def submit(self, message: Notification) -> bool:
        """Starts to send a message, or logs why not. Returns at once whether it is being sent."""
        if not self.channels:
            return False
        if (why := self._withheld(message)) is not None:
            log.info("notification not sent (%s): %s", why, message.title)
            return False
        message = replace(message, unsent=self._unsent, root=self._root)
        self._unsent = 0
        for channel, lock in zip(self.channels, self._locks, strict=True):
            task = asyncio.create_task(self._deliver(channel, lock, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return True

    def _withheld(self, message: Notification) -> str | None:
        """Why a message is not sent; None if it is. Only alerts count towards the rate limit."""
        if LEVELS.index(message.level) < self._level:
            return f"below the level {LEVELS[self._level]}"
        if message.level != "error" and self._is_quiet():
            return "quiet hours"
        if message.kind != "alert":  # the end of a run must not be lost in a flood of alerts
            return None
        now = self._now()
        # One of the future was sent before the clock was set back: it must not count for longer.
        while self._alerts and not 0 <= now - self._alerts[0] < HOUR:
            self._alerts.popleft()
        if len(self._alerts) >= self._max_per_hour:
            self._unsent += 1
            return f"dropped by the rate limit of {self._max_per_hour} an hour"
        self._alerts.append(now)
        return None

    def _is_quiet(self) -> bool:
        if self._quiet is None:
            return False
        local = time.localtime(self._now())
        first, last = self._quiet
        minute = local.tm_hour * 60 + local.tm_min
        return first <= minute < last if first < last else minute >= first or minute < last

    async def _deliver(self, channel: Channel, lock: asyncio.Lock, message: Notification) -> None:
        try:
            async with lock:
                await send(channel, message)
        except NotificationError as error:
            log.warning("%s failed: %s; not sent: %s", channel.name, error, message.title)
        except asyncio.CancelledError:
            log.warning("%s: the engine ended before it was sent: %s", channel.name, message.title)
            raise
        except Exception:  # one channel must not end the training or the other channels
            log.exception("%s failed; not sent: %s", channel.name, message.title)
        else:
            log.info("%s sent: %s", channel.name, message.title)

    async def finish(self) -> None:
        """Waits up to :data:`FINISH_TIMEOUT` for messages being sent; cancels the rest."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=FINISH_TIMEOUT)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=CANCEL_TIMEOUT)

    def cancel(self) -> None:
        """Cancels and logs the messages being sent, so that :meth:`finish` returns."""
        for task in self._tasks:
            task.cancel()
