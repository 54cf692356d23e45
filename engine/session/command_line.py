"""Command lines of rlhf-tui in messages, which can be pasted into the shell they are shown in."""

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "rlhf-tui"
SESSIONS_VARIABLE = "RLHF_TUI_SESSIONS"
"""Names the folder of sessions that its user has set."""


def command(*words: str, root: Path | None = None) -> str:
    """A command of rlhf-tui as it can be typed here: `.venv/bin/rlhf-tui ls` if not on PATH.

    Args:
        words: the command and its arguments.
        root: the folder of sessions that it is about: added as `--sessions` if the command would
            look in another one. None if it is about none, or is to be typed on another machine.
    """
    where = [] if root is None else _sessions_option(root)
    return shlex.join([PROGRAM if shutil.which(PROGRAM) else _called(), *words, *where])


def _called() -> str:
    """The program as it was called; if another one was, such as that of `--headless`, its path."""
    if Path(sys.argv[0]).name == PROGRAM:
        return sys.argv[0]
    installed = Path(sys.executable).with_name(PROGRAM)
    if not installed.is_file():
        return PROGRAM
    path = _from_here(installed)
    return path if os.sep in path else f"./{path}"


def _sessions_option(root: Path) -> list[str]:
    try:
        if root.resolve() == Path(os.environ.get(SESSIONS_VARIABLE) or "sessions").resolve():
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
