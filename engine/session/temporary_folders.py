"""Temporary folders that are removed even if the process that made them was killed."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from engine.errors import SessionError
from engine.session import lock

PREFIX = "rlhf-tui-"
LOCK = ".rlhf-tui.lock"
GRACE = 60.0
"""Seconds for which a new folder is left alone: it is created before it is locked."""


class TemporaryFolder:
    """A folder under the system's temporary one, locked while its process lives.

    The kernel releases the lock of a process that was killed, so the next TemporaryFolder that any
    process of this user creates can tell that the folder is abandoned, and removes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Creates the folder, mode 0700. Raises OSError or SessionError if that is impossible.

        Args:
            parent: the folder that it is created in, such as shared memory; the system's temporary
                one when left out.
        """
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self._folder = tempfile.TemporaryDirectory(
            prefix=PREFIX, dir=parent, ignore_cleanup_errors=True
        )
        self.path = Path(self._folder.name)
        self._lock = lock.SessionLock(self.path / LOCK)

    def close(self) -> None:
        """Removes the folder with its contents."""
        self._lock.release()  # on NFS an open file keeps its folder from being removed
        self._folder.cleanup()


def remove_abandoned(parent: Path) -> None:
    """Removes the folders of processes that were killed; what cannot be removed stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        file = folder / LOCK
        with contextlib.suppress(OSError, SessionError):
            status = file.lstat()
            mine = status.st_uid == folder.lstat().st_uid == os.getuid()
            if not mine or time.time() - status.st_mtime <= GRACE:
                continue
            held = lock.SessionLock(file)  # raises SessionError while its process lives
            try:
                shutil.rmtree(folder)
            finally:
                held.release()
