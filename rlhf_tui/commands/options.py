"""Options that several commands share, and what they mean."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from engine.session.folder import Session, find
from engine.session.registry import live_sessions
from rlhf_tui.text import sanitise

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SESSIONS = "The folder of sessions."
JSON = "Print one JSON value."

sessions_option: Decorator = click.option(
    "--sessions",
    "root",
    type=click.Path(path_type=Path),
    envvar="RLHF_TUI_SESSIONS",
    default=Path("sessions"),
    show_default="$RLHF_TUI_SESSIONS or ./sessions",
    help=SESSIONS,
)

json_option: Decorator = click.option("--json", "as_json", is_flag=True, help=JSON)

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


def print_json(value: Any) -> None:
    """One JSON value; ASCII, so that no terminal can be made to obey it."""
    click.echo(json.dumps(value, allow_nan=False))


def say(text: str) -> None:
    """A line for people, sanitised, on stdout."""
    click.echo(sanitise(text))


def is_terminal() -> bool:
    """Whether a full screen can be shown here."""
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
