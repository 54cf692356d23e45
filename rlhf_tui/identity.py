"""Who steers: user, host and terminal, as the command log shows them."""

import contextlib
import getpass
import os


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
