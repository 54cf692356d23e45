"""The operator's identity as the journal records it with each command."""

import contextlib
import os

from engine.session.access import current_user


def who() -> str:
    """User, terminal and SSH client: `ana on pts/1 from 10.0.0.7`."""
    parts = [current_user()]
    if terminal := _terminal():
        parts.append(f"on {terminal.removeprefix('/dev/')}")
    if client := os.environ.get("SSH_CLIENT", "").split(" ")[0]:
        parts.append(f"from {client}")
    # User names need not be valid UTF-8, but the journal stores UTF-8.
    return " ".join(parts).encode("utf-8", "replace").decode()


def _terminal() -> str | None:
    for fd in (0, 1, 2):
        # In a container the terminal may be a device of the host, which has no name inside.
        with contextlib.suppress(OSError):
            return os.ttyname(fd)
    return None
