"""The session's Unix socket, reached by a path that is never too long.

A socket address holds 108 bytes, a sessions folder may lie deeper: bound and reached through
``/proc/self/fd/N/`` the address stays short. Where the file system has no sockets (some network and
container ones), the socket lies in a folder of the user's own under /tmp.
"""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import SessionError

NAME = "engine.sock"


def listen(folder: Path) -> tuple[socket.socket, Path]:
    """A listening socket, mode 0600, and the path others reach it by.

    The caller holds the session's lock, so a socket that lies there already is stale and goes.

    Raises:
        SessionError: neither the session's folder nor /tmp can hold a socket.
    """
    try:
        return _listen_in(folder, NAME)
    except OSError:
        try:
            return _listen_in(_own_folder(), f"{os.getpid()}.sock")
        except OSError as error:
            raise SessionError(f"cannot make a socket for {folder}: {error.strerror}") from error


def connect(path: Path, timeout: float = 5.0) -> socket.socket:
    """A connected socket. Raises OSError when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        with _short(path) as address:
            sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def peer_uid(sock: socket.socket) -> int:
    """Who is at the other end, as the kernel knows it (SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], "little")


def _listen_in(folder: Path, name: str) -> tuple[socket.socket, Path]:
    path = folder / name
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with _short(path) as address:
            sock.bind(address)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock, path


def _own_folder() -> Path:
    """A 0700 folder under the temporary one that is surely ours. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"rlhf-tui-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(0, f"{folder} is not a folder of this user's alone")
    return folder


@contextmanager
def _short(path: Path) -> Iterator[str]:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)
