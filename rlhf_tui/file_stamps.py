"""Tells whether a file has changed since it was looked at last."""

import os
from pathlib import Path


def stamp(path: Path) -> tuple[int, ...]:
    """Returns a value that changes whenever the file changes; () without a file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called every second
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def file_id(path: Path) -> tuple[int, int] | None:
    """Returns device and inode of the file at a path; None without a file."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
