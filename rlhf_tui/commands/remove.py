"""The command that deletes sessions: rm."""

import os
from pathlib import Path

import click

from engine.errors import SessionError, UserInputError
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import complete_name, existing, sessions_option


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@sessions_option
@click.option(
    "-y", "--yes", is_flag=True, help="Delete without confirmation; needed without a terminal."
)
def rm(root: Path, names: tuple[str, ...], yes: bool) -> None:
    """Delete sessions with all their checkpoints."""
    sessions = [existing(root, name) for name in dict.fromkeys(names)]
    if not yes and not os.isatty(0):  # the output may be piped; the question is on stderr
        listed = ", ".join(f"'{session.name}'" for session in sessions)
        raise UserInputError(
            f"stdin is not a terminal: give -y to delete {listed} without confirmation"
        )
    for session in sessions:
        _delete(session, yes=yes)


def _delete(session: SessionFolder, *, yes: bool) -> None:
    """Deletes a session, unless the answer to the question is no."""
    lock = session.acquire(f"stop it first: {session.command('ctl', 'stop', '--wait')}")
    try:
        freed = fmt.freed(session.disk_usage())
        question = f"delete session '{session.name}' and its checkpoints ({freed})?"
        if not yes and not click.confirm(question, err=True):
            return
        session.delete(lock)
    except OSError as error:
        raise SessionError(f"cannot delete {session.folder}: {error}") from error
    finally:
        lock.release()
