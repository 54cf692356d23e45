"""Temporary folders: removed even if their process is killed, or moved to their final path."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.errors import SessionError
from engine.session import lock
from engine.session.checkpoints import sync
from engine.session.machine import on_network

PREFIX = "rlhf-tui-"
LOCK_NAME = ".rlhf-tui.lock"
LOCKING_GRACE = 60.0
"""Seconds during which a new folder is left alone: it is created before it is locked."""


class TemporaryFolder:
    """A folder under the system's temporary one, locked while its process lives.

    The kernel releases the lock of a process that is killed. The next TemporaryFolder that any
    process of this user creates therefore recognises the folder as abandoned and removes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Creates the folder, mode 0700. Raises OSError or SessionError if that is impossible.

        Args:
            parent: the folder that it is created in, such as shared memory. Default: the system's
                temporary folder.
        """
        parent = parent or Path(tempfile.gettempdir())
        remove_abandoned(parent)
        self._folder = tempfile.TemporaryDirectory(
            prefix=PREFIX, dir=parent, ignore_cleanup_errors=True
        )
        self.path = Path(self._folder.name)
        self._lock = lock.SessionLock(self.path / LOCK_NAME)

    def close(self) -> None:
        """Removes the folder with its contents."""
        self._lock.release()  # on NFS an open file keeps its folder from being removed
        self._folder.cleanup()


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Context manager that yields a new folder beside `out` and moves it there at the end.

    It is removed instead if the context raises. So `out` has all of its files or does not exist,
    even if the process is killed. What that leaves is removed by the next one beside it, except on
    network file systems, where locks of other machines may not be seen.

    Raises:
        OSError: a folder cannot be created or synced, or `out` exists and is not an empty folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if not on_network(out.parent):
        remove_abandoned(out.parent, ".*.part")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process with the same id
    part.mkdir()
    held = None
    with contextlib.suppress(SessionError):  # a file system without locks
        held = lock.SessionLock(part / LOCK_NAME)
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
        if out.exists():
            out.rmdir()  # an empty folder; another one raises
        part.rename(out)
        # Only now: without its lock file, the folder would look abandoned.
        (out / LOCK_NAME).unlink(missing_ok=True)
        sync(out.parent)
    finally:
        if held is not None:
            held.release()
        shutil.rmtree(part, ignore_errors=True)


def remove_abandoned(parent: Path, pattern: str = f"{PREFIX}*") -> None:
    """Removes the folders of processes that were killed; ignores those it cannot remove."""
    for folder in parent.glob(pattern):
        file = folder / LOCK_NAME
        with contextlib.suppress(OSError, SessionError):
            status = file.lstat()
            mine = status.st_uid == folder.lstat().st_uid == os.getuid()
            if not mine or time.time() - status.st_mtime <= LOCKING_GRACE:
                continue
            lock.SessionLock(file).release()  # raises SessionError while its process lives
            shutil.rmtree(folder)
