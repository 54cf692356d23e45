"""The command that opens the dashboard, attach, and the session browser."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.errors import NoSuchSessionError, UserInputError
from engine.session.folder import Session, all_sessions
from engine.session.registry import live_sessions
from rlhf_tui import terminal_colors
from rlhf_tui.commands.options import (
    colors_option,
    complete_name,
    existing,
    is_terminal,
    sessions_option,
)

if TYPE_CHECKING:  # msgspec and SQLite: only a command that opens the app imports them
    from rlhf_tui.state.first_read import FirstRead


@click.command()
@click.argument("name", required=False, shell_complete=complete_name)
@sessions_option
@colors_option
@click.option("--read-only", is_flag=True, help="Show the session, send no commands.")
def attach(root: Path, name: str | None, read_only: bool) -> None:
    """Open the dashboard of a session.

    Without NAME: of the only live session.
    """
    root = root.resolve()
    session = existing(root, name) if name else _only_live(root)
    _need_terminal(f"rlhf-tui status {session.name} or rlhf-tui metrics {session.name}")
    sys.exit(open_screen(session.folder.parent, session, read_only=read_only))


def browse(root: Path) -> None:
    """Opens the session browser."""
    _need_terminal("rlhf-tui ls, rlhf-tui status NAME or rlhf-tui metrics NAME")
    sys.exit(open_screen(root.resolve(), None))


def open_screen(root: Path, session: Session | None, *, read_only: bool = False) -> int:
    """Runs the app on a folder of sessions, or on one of them. Returns the exit code."""
    # Modules and long sessions allocate millions of objects that are not garbage; with the default
    # thresholds, collections took a third of the time until the first curve.
    gc.set_threshold(200_000, 20, 20)
    terminal_colors.choose(os.environ)
    first_read = begin_first_read(session) if session is not None else None
    from rlhf_tui.app.app import open_app  # noqa: PLC0415 - Textual is slow to import

    return open_app(root, session.name if session is not None else None, read_only, first_read)


def begin_first_read(session: Session) -> "FirstRead":
    """Starts reading the curves of the charts in a thread while the app is imported."""
    from rlhf_tui.state.first_read import FirstRead  # noqa: PLC0415
    from rlhf_tui.state.preferences import load_preferences  # noqa: PLC0415

    return FirstRead(session, load_preferences()[0].metrics())


def _only_live(root: Path) -> Session:
    sessions = all_sessions(root)
    live = [s for s in sessions if s.is_live()] or live_sessions()
    if len(live) == 1:
        return live[0]
    if live:
        names = ", ".join(s.name for s in live)
        raise UserInputError(f"several sessions are live, give one: {names}")
    if not sessions:
        raise NoSuchSessionError(f"no sessions in {root}; start one with: rlhf-tui demo")
    raise NoSuchSessionError(
        f"no live session in {root}; give the name of a finished one (rlhf-tui ls), "
        "or resume one: rlhf-tui resume NAME"
    )


def _need_terminal(instead: str) -> None:
    """Raises UserInputError, which names the command `instead`, if the app cannot run here."""
    if not is_terminal():
        why = "TERM is 'dumb'" if os.environ.get("TERM") == "dumb" else "this is not a terminal"
        raise UserInputError(f"{why}, so the app cannot run; use {instead}")
