"""The command that deletes sessions: rm."""

import os
import re
from pathlib import Path

import click

from engine.errors import (
    CommandRejectedError,
    NoSuchSessionError,
    RlhfError,
    SessionError,
    UserInputError,
)
from engine.launch.delete_checkpoint import delete_aside, delete_checkpoint
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import existing, sessions_option, show_wait
from rlhf_tui.commands.shell_complete import complete_name, complete_saved_step
from rlhf_tui.identity import who


def checkpoint_name(text: str) -> int | str:
    """A step, or `120-attempt-2` for a checkpoint that was moved aside. Raises BadParameter."""
    if match := re.fullmatch(r"(?:step-0*)?(\d+-attempt-\d+(?:-\d+)?)", text):
        return match[1]
    return int(click.IntRange(min=1)(text))


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@sessions_option
@click.option(
    "-y", "--yes", is_flag=True, help="Delete without confirmation; needed without a terminal."
)
@click.option(
    "--checkpoint", "step", type=checkpoint_name, metavar="STEP",
    shell_complete=complete_saved_step,
    help="Delete only this checkpoint of the session, or, also while it is live, one that was "
    "moved aside: STEP-attempt-N.",
)  # fmt: skip
def rm(root: Path, names: tuple[str, ...], yes: bool, step: int | str | None) -> None:
    """Delete sessions with all their checkpoints.

    They must have ended. A live engine deletes a checkpoint with ctl NAME delete-checkpoint STEP.
    """
    sessions = [_in_folder(root, name) for name in dict.fromkeys(names)]
    if step is not None and len(sessions) > 1:
        raise UserInputError("--checkpoint takes one session")
    if not yes and not os.isatty(0):  # the output may be piped; the question is on stderr
        listed = ", ".join(f"'{session.name}'" for session in sessions)
        what = listed if step is None else f"a checkpoint of {listed}"
        raise UserInputError(
            f"stdin is not a terminal: give -y to delete {what} without confirmation"
        )
    for session in sessions:
        if step is None:
            _delete(session, yes=yes)
        else:
            _delete_checkpoint(session, step, yes=yes)


def _in_folder(root: Path, name: str) -> SessionFolder:
    """The session of a name, which must be in `root`: one elsewhere may be another of that name.

    It is found there while it is live, and could be deleted if it ended just then.
    """
    session = existing(root, name)
    if session.folder.parent != root.resolve():
        there = session.command("rm")
        raise NoSuchSessionError(
            f"no session '{name}' in {root.resolve()}; a live one is in {session.folder.parent}: "
            f"stop it, then: {there}"
        )
    return session


def _delete_checkpoint(session: SessionFolder, step: int | str, *, yes: bool) -> None:
    what = f"of step {step}" if isinstance(step, int) else step
    question = f"delete the checkpoint {what} of '{session.name}'?"
    if not yes and not click.confirm(question, err=True):
        return
    try:
        if isinstance(step, int):
            delete_checkpoint(session, step, who(), show_wait)
        else:
            delete_aside(session, step)
    except CommandRejectedError as error:
        raise RlhfError(str(error)) from error


def _delete(session: SessionFolder, *, yes: bool) -> None:
    """Deletes a session, unless the answer to the question is no."""
    lock = session.acquire(f"stop it first: {session.command('ctl', 'stop', '--wait')}")
    try:
        session.check_other_machine(show_wait)
        freed = fmt.freed(session.disk_usage())
        question = f"delete session '{session.name}' and its checkpoints ({freed})?"
        if not yes and not click.confirm(question, err=True):
            return
        session.delete(lock)
    except OSError as error:
        raise SessionError(f"cannot delete {session.folder}: {error}") from error
    finally:
        lock.release()
