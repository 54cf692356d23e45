"""Commands that open the terminal app: attach, and the browser."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.errors import NoSuchSessionError, UserInputError
from engine.session.folder import Session, all_sessions
from engine.session.registry import live_sessions
from rlhf_tui.commands.options import existing, is_terminal, sessions_option

if TYPE_CHECKING:  # msgspec and SQLite: only a command that opens the app imports them
    from rlhf_tui.state.first_read import FirstRead


@click.command()
@click.argument("name", required=False)
@sessions_option
@click.option("--read-only", is_flag=True, help="Only look: no commands.")
def attach(root: Path, name: str | None, read_only: bool) -> None:
    """Open the dashboard of a session; without NAME, of the only one that runs."""
    root = root.resolve()
    session = existing(root, name) if name else _only_live(root)
    _need_terminal(f"rlhf-tui status {session.name} or rlhf-tui metrics {session.name}")
    sys.exit(open_screen(session.folder.parent, session, read_only=read_only))


def browse(root: Path) -> None:
    """Opens the session browser."""
    _need_terminal("rlhf-tui ls, rlhf-tui status NAME or rlhf-tui metrics NAME")
    sys.exit(open_screen(root.resolve(), None))


def open_screen(root: Path, session: Session | None, *, read_only: bool = False) -> int:
    """The app, on a folder of sessions or on one of them; its exit code."""
    # A long session is millions of small objects, and so are the modules that are imported now,
    # none of them garbage: looking for some among them took a third of the time to the first curve.
    gc.set_threshold(200_000, 20, 20)
    first_read = begin_first_read(session) if session is not None else None
    from rlhf_tui.app.app import open_app  # noqa: PLC0415 - Textual takes its time to be imported

    return open_app(root, session.name if session is not None else None, read_only, first_read)


def begin_first_read(session: Session) -> "FirstRead":
    """Reads the outlines of the operator's charts while the app is being imported."""
    from rlhf_tui.state.first_read import FirstRead  # noqa: PLC0415
    from rlhf_tui.state.preferences import load_preferences  # noqa: PLC0415

    return FirstRead(session, load_preferences()[0].metrics())


def _only_live(root: Path) -> Session:
    here = all_sessions(root)
    live = [s for s in here if s.is_live()] or live_sessions()
    if len(live) == 1:
        return live[0]
    if live:
        names = ", ".join(s.name for s in live)
        raise UserInputError(f"give one of the sessions that run: {names}")
    if not here:
        raise NoSuchSessionError(f"no sessions in {root}; start one with: rlhf-tui demo")
    raise NoSuchSessionError(
        f"no session runs in {root}; give a name to look at a finished one (rlhf-tui ls), "
        "or resume one: rlhf-tui resume NAME"
    )


def _need_terminal(instead: str) -> None:
    """The app needs a whole screen. Raises UserInputError."""
    if not is_terminal():
        why = "TERM is 'dumb'" if os.environ.get("TERM") == "dumb" else "this is not a terminal"
        raise UserInputError(f"{why}, so no full screen can be shown; use {instead}")
