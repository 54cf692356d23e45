"""The Unix socket of a session.

A socket address is limited to 108 bytes, which a session's path may exceed. The address used here
is ``/proc/self/fd/N/engine.sock``, where N is an open descriptor of the folder. On a file system
without sockets, as on some networks and in some containers, the socket is created in a private
folder under /tmp.
"""

import hashlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import SessionError
from engine.session.access import FILE_MODE, private_temporary_folder

NAME = "engine.sock"
ROLLOUT_NAME = "rollout.sock"
"""Names of the sockets: the supervisor's, and that of the first rollout engine."""
RETRY_INTERVAL = 0.05
"""Seconds between attempts to connect to an engine whose connection queue is full."""
_CREDENTIALS = struct.Struct("=iii")


def rollout_name(engine: int) -> str:
    """The name of the socket of one of `rollout.engines`, counted from 0."""
    return ROLLOUT_NAME if engine == 0 else f"rollout-{engine}.sock"


def listen(folder: Path, name: str = NAME) -> tuple[socket.socket, Path]:
    """Creates a listening socket with mode 0600.

    An existing socket is stale, because the caller holds the session's lock, and is replaced.

    Returns:
        The socket and its path.

    Raises:
        SessionError: a socket can be created neither in the session's folder nor under /tmp.
    """
    try:
        return _listen_in(folder, name)
    except OSError:
        try:
            # Not by process id, of which containers that share /tmp have the same.
            of_folder = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
            return _listen_in(private_temporary_folder(), f"{of_folder}.{name}")
        except OSError as error:
            raise SessionError(f"cannot create a socket for {folder}: {error.strerror}") from error


def connect(path: Path, timeout: float = 5.0) -> socket.socket:
    """Connects to a socket. Raises OSError if no process listens there, or none accepts in time."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            with _short_address(path) as address:
                sock.connect(address)
        except BlockingIOError:  # the queue of connections is full; Unix sockets do not wait
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_INTERVAL)
        except OSError:
            sock.close()
            raise
        else:
            return sock


def may_be_of(folder: Path, path: Path) -> bool:
    """Whether the socket at a path may be that of an engine of a session's folder.

    It is not if the folder was copied with its engine.json, or moved, and another session is at the
    path that engine.json names.
    """
    try:  # others are under /tmp, or forwarded
        return path.name != NAME or path.parent.samefile(folder)
    except OSError:  # there is none
        return True


def peer_uid(sock: socket.socket) -> int:
    """The user id of the peer, from the kernel (SO_PEERCRED)."""
    return _peer_credentials(sock)[1]


def peer_pid(sock: socket.socket) -> int:
    """The process id of the peer, from the kernel, as valid in this process.

    In its own pid namespace the peer may have a different id. 0 if it is in a namespace that this
    process cannot see.
    """
    return _peer_credentials(sock)[0]


def _peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group id."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(found)
    return pid, uid, gid


def _listen_in(folder: Path, name: str) -> tuple[socket.socket, Path]:
    path = folder / name
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_address(path) as address:
            sock.bind(address)
            # Nobody can connect before listen(); a umask would be that of all threads.
            os.chmod(address, FILE_MODE)  # noqa: PTH101 - the address is no path of its own
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock, path


@contextmanager
def _short_address(path: Path) -> Iterator[str]:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)
