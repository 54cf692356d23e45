"""Commands that open the terminal app: attach, and the browser."""

import os
import sys
from pathlib import Path

import click

from engine.errors import NoSuchSessionError, UserInputError
from engine.session import find_all
from rlhf_tui.commands.options import existing, is_terminal, sessions_option


@click.command()
@click.argument("name", required=False)
@sessions_option
@click.option("--read-only", is_flag=True, help="Only look: no commands.")
def attach(root: Path, name: str | None, read_only: bool) -> None:
    """Open the dashboard of a session; without NAME, of the only one that runs."""
    root = root.resolve()
    chosen = name or _only_live(root)
    existing(root, chosen)
    _need_terminal(f"rlhf-tui status {chosen} or rlhf-tui metrics {chosen}")
    sys.exit(open_screen(root, chosen, read_only=read_only))


def browse(root: Path) -> None:
    """Opens the session browser."""
    _need_terminal("rlhf-tui ls, rlhf-tui status NAME or rlhf-tui metrics NAME")
    sys.exit(open_screen(root.resolve(), None))


def open_screen(root: Path, name: str | None, *, read_only: bool = False) -> int:
    """The app, on a folder of sessions or on one of them; its exit code."""
    from rlhf_tui.app import open_app  # noqa: PLC0415 - Textual takes its time to be imported

    return open_app(root, name, read_only)


def _only_live(root: Path) -> str:
    sessions = find_all(root)
    live = [s.name for s in sessions if s.is_live()]
    if len(live) == 1:
        return live[0]
    if live:
        raise UserInputError(f"give one of the sessions that run: {', '.join(live)}")
    if not sessions:
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
