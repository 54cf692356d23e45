"""Command lines of rlhf-tui in messages, which can be pasted where the messages are shown."""

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "rlhf-tui"
SESSIONS_VARIABLE = "RLHF_TUI_SESSIONS"
"""Names the folder of sessions that its user has set."""


COPIES = ".copies"
"""A file in a folder whose sessions are copies of those of another machine."""


def sessions_folder() -> Path:
    """The folder of sessions where none is given: the one that its user has set, or ./sessions."""
    return Path(os.environ.get(SESSIONS_VARIABLE) or "sessions")


def mark_copies(root: Path) -> None:
    """Marks a folder of copies: commands about its sessions are to be typed on their machine.

    Raises:
        OSError: the mark cannot be created.
    """
    (root / COPIES).touch()


def command(*words: str, root: Path | None = None) -> str:
    """A command of rlhf-tui as it can be typed here: `.venv/bin/rlhf-tui ls` if not on PATH.

    Args:
        words: the command and its arguments.
        root: the folder of sessions that it is about: added as `--sessions` if the command would
            look in another one. None if it is about none. If it has copies, the command is as it
            can be typed on their machine.
    """
    if root is not None and (root / COPIES).exists():
        return shlex.join([PROGRAM, *words])
    where = [] if root is None else _sessions_option(root)
    return shlex.join([PROGRAM if shutil.which(PROGRAM) else _called(), *words, *where])


def recorded_command(*words: str, root: Path) -> str:
    """A command of an engine's message, which is recorded and read in any folder of its machine.

    Args:
        words: the command and its arguments.
        root: the folder of sessions that it is about, an absolute path.
    """
    program = PROGRAM if shutil.which(PROGRAM) else str(_installed() or PROGRAM)
    return shlex.join([program, *words, "--sessions", str(root)])


def _called() -> str:
    """The program as it was called; if another one was, such as that of `--headless`, its path."""
    if Path(sys.argv[0]).name == PROGRAM:
        return sys.argv[0]
    installed = _installed()
    if installed is None:
        return PROGRAM
    path = _from_here(installed)
    return path if os.sep in path else f"./{path}"


def _installed() -> Path | None:
    """The program beside this Python, an absolute path."""
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
    """An absolute path as it is typed in the current folder."""
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(below)
