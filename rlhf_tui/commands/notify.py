"""The command that tries the channels of notifications: notify test."""

import asyncio
from dataclasses import replace
from pathlib import Path

import click

from engine.config import file as config_file
from engine.config.sections.supervision import NotifyConfig
from engine.errors import RlhfError, UserInputError
from engine.monitoring.channels.message import Notification, NotificationError, trial
from engine.monitoring.notify import Channel, open_channels, send
from rlhf_tui.commands.options import existing, say, sessions_option
from rlhf_tui.commands.shell_complete import Group, complete_name


class UnsentError(RlhfError):
    """A test message could not be sent."""


@click.group(cls=Group, no_args_is_help=False)
def notify() -> None:
    """Test the notification channels."""


@notify.command()
@click.argument("name", shell_complete=complete_name)
@sessions_option
def test(root: Path, name: str) -> None:
    """Send a test message on every channel.

    NAME is a session or a configuration file. URLs and tokens come from this terminal's
    environment. Level, quiet hours and rate limit do not apply.
    """
    message, config = _section(root, name)
    channels = open_channels(config)
    if not channels:
        raise UserInputError(
            f"{name} has no notification channel: set notify.command, notify.webhooks or "
            "notify.email"
        )
    failed = asyncio.run(_try_all(channels, message))
    if failed:
        raise UnsentError(f"{failed} of {len(channels)} channels failed")


def _section(root: Path, name: str) -> tuple[Notification, NotifyConfig]:
    """The message to send, and the `notify` section."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return trial(path.stem), config_file.load(path).notify
    session = existing(root, name)
    session.check_owner()
    message = replace(trial(session.name), root=session.folder.resolve().parent)
    return message, session.config().notify


async def _try_all(channels: list[Channel], message: Notification) -> int:
    """Sends a message on each channel and prints the outcome; returns how many failed."""
    failed = 0
    for channel in channels:
        try:
            await send(channel, message)
        except NotificationError as error:
            failed += 1
            say(f"{channel.name}: ", ("failed", "bad"), f": {error}")
        else:
            say(f"{channel.name}: ", ("sent", "good"))
    return failed
