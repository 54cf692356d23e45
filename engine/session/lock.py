"""The lock of a session, held by at most one engine.

It is an open-file-description lock (fcntl(2)). The kernel releases it when the last process that
has the file open ends, so it cannot become stale after a kill -9 or a reboot. Unlike flock(2), it
can be tested without being taken, so readers do not interfere with an engine that starts.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

from engine.errors import SessionError, SessionLockedError
from engine.session.access import open_regular

# struct flock: l_type, l_whence, (padding), l_start, l_len, l_pid; native sizes.
_FLOCK = struct.Struct("hhqqi0q")


class SessionLock:
    """The lock on one file, held from construction to :meth:`release`."""

    def __init__(self, path: Path) -> None:
        """Takes the lock.

        Raises:
            SessionLockedError: another process holds it.
            SessionError: the file cannot be created, as in a read-only folder.
        """
        self._path = path
        try:
            self._fd = open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise SessionError(f"cannot lock {path}: {error.strerror}") from error
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        except OSError as error:
            os.close(self._fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise SessionLockedError(f"{path} is held by another engine") from None
            raise SessionError(f"cannot lock {path}: {error.strerror}") from error

    def is_in_place(self) -> bool:
        """Whether its file was neither deleted nor replaced. Raises OSError."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            return False

    def restore(self) -> bool:
        """Takes the lock on a new file if its own was deleted or replaced.

        Returns:
            Whether that was so.

        Raises:
            SessionLockedError: another process holds the new file's.
            SessionError: the file cannot be created.
            OSError: the file cannot be looked at.
        """
        if self.is_in_place():
            return False
        new = SessionLock(self._path)
        self._fd, new._fd = new._fd, self._fd
        new.release()
        return True

    def release(self) -> None:
        """Releases the lock; does nothing if it was released before."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. Does not take it.

    Raises:
        SessionError: the lock cannot be tested, such as without a free file descriptor.
    """
    try:
        fd = open_regular(path)
        try:
            query = _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
            kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))[0]
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        text = f"cannot tell whether an engine holds {path}: {error.strerror}"
        raise SessionError(text) from error
    return bool(kind != fcntl.F_UNLCK)
