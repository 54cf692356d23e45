"""The commands that open the dashboard: attach, replay, mirror, and the session browser."""

import gc
import io
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.errors import UserInputError
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui import terminal_colors
from rlhf_tui.commands.options import (
    FiniteRange,
    check_listable,
    colors_option,
    existing,
    folder_is_given,
    is_terminal,
    name_argument,
    only_live,
    optional_name_argument,
    sessions_option,
    show_wait,
    why_no_terminal,
)

if TYPE_CHECKING:  # msgspec and SQLite: only a command that opens the app imports them
    from rlhf_tui.screens.context import Origin
    from rlhf_tui.state.feeds.first_read import FirstRead
    from rlhf_tui.state.replay.player import ReplayOptions
    from rlhf_tui.state.runs.listing import SessionListCache

STARTED = 15.0
"""Seconds after which the curves of a long session have been read."""
TAIL_STEPS = 5000
"""Number of newest steps whose metrics a copy has."""
MIRROR_INTERVAL, HEARTBEAT = 0.5, 10.0
"""Seconds between two readings for a copy, and after which something is sent in any case."""


@click.command()
@optional_name_argument
@sessions_option
@colors_option
@click.option("--read-only", is_flag=True, help="Show the session, send no commands.")
@click.option(
    "--tail", type=click.IntRange(min=1), default=TAIL_STEPS, show_default=True, metavar="N",
    help="With ssh://: copy the metrics of the last N steps.",
)  # fmt: skip
def attach(root: Path, name: str | None, read_only: bool, tail: int) -> None:
    """Open the dashboard of a session.

    Without NAME, opens the only live session.

    NAME can be ssh://[USER@]HOST[:PORT]/NAME, a session on another machine.
    """
    if name and name.startswith("ssh://"):
        folder = root if folder_is_given() else None
        sys.exit(_attach_remote(name, folder, read_only=read_only, tail=tail))
    session = existing(root, name) if name else only_live(root)
    _need_terminal(_either(session, "status", "metrics"))
    sys.exit(open_screen(session.folder.parent, session, read_only=read_only))


@click.command()
@name_argument
@sessions_option
@colors_option
@click.option(
    "--speed", type=FiniteRange(0.01, 100_000), default=20.0, show_default=True,
    metavar="N", help="Seconds of the run per second of the replay.",
)  # fmt: skip
@click.option(
    "--from", "from_step", type=click.IntRange(min=0), default=0, metavar="STEP",
    help="Begin after this step.",
)  # fmt: skip
def replay(root: Path, name: str, speed: float, from_step: int) -> None:
    """Show a session as it was, step by step, in the dashboard."""
    session = existing(root, name)
    from engine.journal.reader import JournalReader  # noqa: PLC0415 - the start of attach is short
    from rlhf_tui.state.replay.player import ReplayOptions  # noqa: PLC0415

    with JournalReader(session) as reader:
        last, attempts = reader.last_step(), reader.attempts()
    if not attempts:
        raise UserInputError(f"session '{name}' has recorded nothing yet; wait for its first step")
    if from_step > last:
        raise UserInputError(f"--from {from_step}: session '{name}' has {last} steps")
    _need_terminal(_either(session, "events", "report"))
    options = ReplayOptions(speed, from_step)
    sys.exit(open_screen(session.folder.parent, session, replay=options))


@click.command(hidden=True)
@name_argument
@sessions_option
@click.option(
    "--tail", type=click.IntRange(min=1), default=TAIL_STEPS, metavar="N",
    help="Send the metrics of the last N steps.",
)  # fmt: skip
def mirror(root: Path, name: str, tail: int) -> None:
    """Send a session to a copy on another machine: `attach ssh://HOST/NAME` runs it there."""
    from rlhf_tui.remote.messages import Done, encode  # noqa: PLC0415 - only this command needs it
    from rlhf_tui.remote.source import SessionSource  # noqa: PLC0415

    source, output = SessionSource(existing(root, name), tail), sys.stdout.buffer
    output.write(encode(source.hello()))
    sent = time.monotonic()
    while True:
        for message in source.changes():
            output.write(encode(message))
            sent = time.monotonic()
        if time.monotonic() - sent > HEARTBEAT:  # a connection that is gone is only noticed so
            output.write(encode(Done()))
            sent = time.monotonic()
        output.flush()
        time.sleep(MIRROR_INTERVAL)


def _attach_remote(text: str, folder: Path | None, *, read_only: bool, tail: int) -> int:
    """Runs the app on the copy of a session of another machine. Returns the exit code."""
    from rlhf_tui.remote.ssh import Address, RemoteSession  # noqa: PLC0415

    address = Address.parse(text)
    if not address.name:
        text = text.rstrip("/")
        ls = fmt.command("ls", text)
        raise UserInputError(f"give the session: {text}/NAME; list them with: {ls}")
    _need_terminal(f"ssh {address.host} rlhf-tui status {address.name}")
    arguments = ["mirror", address.name, "--tail", str(tail)]
    arguments += ["--sessions", str(folder)] if folder is not None else []
    show_wait(f"connecting to {address.host}")
    with RemoteSession(address, arguments) as remote:
        session = SessionFolder(remote.root / remote.name)
        return open_screen(remote.root, session, read_only=read_only, origin=remote)


def browse(root: Path) -> None:
    """Opens the session browser."""
    check_listable(root)
    words = (["ls"], ["status", "NAME"], ["metrics", "NAME"])
    ls, status, metrics = (fmt.command(*each, root=root) for each in words)
    _need_terminal(f"{ls}, {status} or {metrics}")
    sys.exit(open_screen(root.resolve(), None))


def open_screen(
    root: Path,
    session: SessionFolder | None,
    *,
    read_only: bool = False,
    replay: "ReplayOptions | None" = None,
    origin: "Origin | None" = None,
) -> int:
    """Runs the app on a folder of sessions, or on one of them. Returns the exit code.

    Args:
        root: the folder.
        session: one of its sessions; None for the browser.
        read_only: sends no commands.
        replay: replays the session.
        origin: the session that this one is a copy of; None if it is not a copy.
    """
    # Modules and long sessions allocate millions of objects that are not garbage; with the default
    # thresholds, collections took a third of the time until the first curve.
    gc.set_threshold(200_000, 20, 20)
    started = threading.Timer(STARTED, collect_what_is_drawn)
    started.daemon = True
    started.start()
    terminal_colors.choose(os.environ)
    # Textual draws on it. Nearly all terminals take UTF-8, whatever the locale says.
    if isinstance(sys.__stderr__, io.TextIOWrapper):
        sys.__stderr__.reconfigure(encoding="utf-8")
    first_read = begin_first_read(session) if session is not None and replay is None else None
    listing = begin_listing(root) if session is None else None
    from rlhf_tui.app.app import RlhfApp, run_app  # noqa: PLC0415 - Textual is slow to import

    app = RlhfApp(
        root, session.name if session is not None else None, read_only=read_only,
        first_read=first_read, replay=replay, origin=origin, listing=listing,
    )  # fmt: skip
    return run_app(app)


def collect_what_is_drawn() -> None:
    """Sets thresholds to collect the garbage of drawing, and excludes all existing objects.

    Each line that Textual draws leaves a garbage cycle. With the thresholds of the start the memory
    of a dashboard grew by half within 4,000 steps.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def begin_first_read(session: SessionFolder) -> "FirstRead":
    """Starts reading the curves of the charts in a thread while the app is imported."""
    from rlhf_tui.state.feeds.first_read import FirstRead  # noqa: PLC0415
    from rlhf_tui.state.preferences import load_preferences  # noqa: PLC0415

    return FirstRead(session, load_preferences()[0].metrics())


def begin_listing(root: Path) -> "SessionListCache":
    """Starts reading the list of sessions in a thread while the app is imported."""
    from rlhf_tui.state.preferences import load_preferences  # noqa: PLC0415
    from rlhf_tui.state.runs.listing import SessionListCache  # noqa: PLC0415

    listing = SessionListCache()
    listing.begin(root, load_preferences()[0].listed_metric)
    return listing


def _either(session: SessionFolder, first: str, second: str) -> str:
    """Two commands on a session, to choose from."""
    name, root = session.name, session.folder.parent
    return f"{fmt.command(first, name, root=root)} or {fmt.command(second, name, root=root)}"


def _need_terminal(instead: str) -> None:
    """Raises UserInputError, which names the command `instead`, if the app cannot run here."""
    if not is_terminal():
        raise UserInputError(f"{why_no_terminal()}, so the app cannot run; use {instead}")
