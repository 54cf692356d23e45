"""Command lines of rlhf-tui for messages, written so that they can be pasted into a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "rlhf-tui"
SESSIONS_VARIABLE = "RLHF_TUI_SESSIONS"
"""The environment variable in which a user sets the folder of sessions."""


COPIES = ".copies"
"""The marker file of a folder whose sessions were copied from another machine."""


def sessions_folder() -> Path:
    """The default folder of sessions: the one that the user has set, or ./sessions."""
    return Path(os.environ.get(SESSIONS_VARIABLE) or "sessions")


def mark_copies(root: Path) -> None:
    """Marks a folder as holding copies: commands on its sessions belong on their own machine.

    Raises:
        OSError: the mark cannot be created.
    """
    (root / COPIES).touch()


def command(*words: str, root: Path | None = None) -> str:
    """A command of rlhf-tui as it can be typed here: `.venv/bin/rlhf-tui ls` if not on PATH.

    Args:
        words: the command and its arguments.
        root: the folder of sessions that the command concerns, None if none. It is added as
            `--sessions` if the command would otherwise look in a different folder. If the folder
            holds copies, the command is written for the machine they came from.
    """
    if root is not None and (root / COPIES).exists():
        return shlex.join([PROGRAM, *words])
    where = [] if root is None else _sessions_option(root)
    return shlex.join([PROGRAM if shutil.which(PROGRAM) else _called(), *words, *where])


def recorded_command(*words: str, root: Path) -> str:
    """A command for an engine's message, which is recorded and later read from any folder.

    Args:
        words: the command and its arguments.
        root: the folder of sessions that the command concerns, an absolute path.
    """
    program = PROGRAM if shutil.which(PROGRAM) else str(_installed() or PROGRAM)
    return shlex.join([program, *words, "--sessions", str(root)])


def _called() -> str:
    """This program as it was called; its path if another was called, as with `--headless`."""
    if Path(sys.argv[0]).name == PROGRAM:
        return sys.argv[0]
    installed = _installed()
    if installed is None:
        return PROGRAM
    path = _from_here(installed)
    return path if os.sep in path else f"./{path}"


def _installed() -> Path | None:
    """The absolute path of the program installed beside this Python."""
    path = Path(sys.executable).with_name(PROGRAM)
    return path if path.is_file() else None


def _sessions_option(root: Path) -> list[str]:
    try:
        if root.resolve() == sessions_folder().resolve():
            return []
    except OSError:  # the current folder is gone
        return ["--sessions", str(root)]
    return ["--sessions", _from_here(root.resolve())]


def _from_here(path: Path) -> str:
    """An absolute path as it would be typed in the current folder."""
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(below)
