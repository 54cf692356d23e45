"""Detects whether a file has changed since it was last looked at."""

import os
from pathlib import Path

FileSignature = tuple[int, ...]
"""Differs from the previous one if the file was changed or replaced; () if there is no file."""


def file_signature(path: Path) -> FileSignature:
    """The inode, time of modification in nanoseconds, and size of a file; () if there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called every second
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def file_id(path: Path) -> tuple[int, int] | None:
    """Returns the device and inode of the file at a path; None if there is no file.

    Unlike the signature, it changes only when another file takes the path, not on writes.

    Raises:
        OSError: it cannot be looked at, such as while a network file system is away.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
