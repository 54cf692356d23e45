"""The lock of a session: one engine at a time, and a question that disturbs nobody.

Open-file-description locks (fcntl(2)): held by the open file, gone with the last process that has
it open, however that process ends — so a lock cannot go stale after a kill -9 or a reboot. Unlike
flock(2) they can be *asked about* without being taken, which a reader must be able to do without
getting in an engine's way.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

from engine.errors import SessionError, SessionLockedError

# struct flock: l_type, l_whence, (padding), l_start, l_len, l_pid; native sizes.
_FLOCK = struct.Struct("hhqqi0q")


class SessionLock:
    """The lock on one file, held from construction to :meth:`release`."""

    def __init__(self, path: Path) -> None:
        """Takes the lock.

        Raises:
            SessionLockedError: another process holds it.
            SessionError: the file cannot be made (a read-only folder, a full disk).
        """
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SessionError(f"cannot lock {path}: {error.strerror}") from error
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        except OSError as error:
            os.close(self._fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise SessionLockedError(f"{path} is held by another engine") from None
            raise SessionError(f"cannot lock {path}: {error.strerror}") from error

    def release(self) -> None:
        """Gives the lock back."""
        os.close(self._fd)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock; asks without taking it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return bool(kind != fcntl.F_UNLCK)
    finally:
        os.close(fd)
