"""Files and folders that commands write to a path given by the user."""

import os
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserInputError


def check_output(path: Path) -> None:
    """Rejects `-`, which means standard output in other programs. Raises UserInputError."""
    if path == Path("-"):
        raise UserInputError("- does not stand for standard output here: give the name of a file")


def is_free(folder: Path) -> bool:
    """Whether a folder can be written without changing anything: it is new or empty."""
    try:
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError:  # which the attempt to write it shows
        return True


def write_output(path: Path, data: bytes | Iterable[bytes]) -> int:
    """Writes a file atomically, replacing an existing one.

    A link stays, and its target is replaced. A device or a pipe, such as `/dev/stdout`, is written
    to; root would otherwise replace it by a file.

    Args:
        path: the file.
        data: its contents, which can be given in parts.

    Returns:
        The number of bytes written.

    Raises:
        UserInputError: it is `-`.
        OSError: it cannot be written.
    """
    check_output(path)
    parts = [data] if isinstance(data, bytes) else data
    if path.exists() and not path.is_file():
        with path.open("wb") as output:
            return sum(map(output.write, parts))
    file = Path(os.path.realpath(path))  # of a loop of links it is the link, which is replaced
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)  # of a killed process with the same id
        with part.open("xb") as output:  # in /tmp another user may put a link there
            size = sum(map(output.write, parts))
        part.replace(file)
        return size
    finally:
        part.unlink(missing_ok=True)
