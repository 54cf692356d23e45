"""Options that several commands share, and what they mean."""

import contextlib
import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from engine.registry import live_sessions
from engine.session import Session, find
from rlhf_tui.text import sanitise

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

sessions_option: Decorator = click.option(
    "--sessions",
    "root",
    type=click.Path(path_type=Path),
    envvar="RLHF_TUI_SESSIONS",
    default=Path("sessions"),
    show_default="$RLHF_TUI_SESSIONS or ./sessions",
    help="The folder of sessions.",
)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="One JSON value on stdout."
)
last_option: Decorator = click.option(
    "--last", type=click.IntRange(min=1), metavar="N", help="Only the last N."
)
override_option: Decorator = click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a configuration key."
)
name_argument: Decorator = click.argument("name")


def existing(root: Path, name: str) -> Session:
    """The session of that name, here or alive elsewhere. Raises NoSuchSessionError."""
    return find(root.resolve(), name, live_sessions())


def who() -> str:
    """Who gives a command: the user, and from where."""
    parts = [_user()]
    if terminal := _terminal():
        parts.append(f"on {terminal.removeprefix('/dev/')}")
    if client := os.environ.get("SSH_CLIENT", "").split(" ")[0]:
        parts.append(f"from {client}")
    # Names need not be UTF-8, and what is kept must be.
    return " ".join(parts).encode("utf-8", "replace").decode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have an entry
        return f"uid-{os.getuid()}"


def _terminal() -> str | None:
    for fd in (0, 1, 2):
        # In a container the terminal may be a device of the machine around it, without a name.
        with contextlib.suppress(OSError):
            return os.ttyname(fd)
    return None


def print_json(value: Any) -> None:
    """One JSON value; ASCII, so that no terminal can be made to obey it."""
    click.echo(json.dumps(value, allow_nan=False))


def say(text: str) -> None:
    """A line for people, sanitised, on stdout."""
    click.echo(sanitise(text))


def is_terminal() -> bool:
    """Whether a full screen can be shown here."""
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
