"""Tells whether a file has changed since it was looked at last."""

import os
from pathlib import Path

FileSignature = tuple[int, ...]
"""Differs from the one before whenever the file was changed or replaced; () without a file."""


def file_signature(path: Path) -> FileSignature:
    """The inode, time of modification in nanoseconds, and size of a file; () if there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called every second
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def file_id(path: Path) -> tuple[int, int] | None:
    """Returns device and inode of the file at a path; None without a file.

    Unlike the signature it stays while the file is written: it tells of another file at the path.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
