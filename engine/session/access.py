"""Who may use a session: the modes of its files, and the check of its owner.

A session's configuration can name Python code, so whoever can write a session can run code as the
user who resumes it. Modes are therefore set explicitly: the umask may be 000.
"""

import os
import pwd
import tempfile
from pathlib import Path

from engine.errors import SessionError

FOLDER_MODE = 0o700
FILE_MODE = 0o600


def make_folders(path: Path) -> None:
    """Creates a folder and its missing parents, each with mode 0700; an existing folder stays.

    Raises:
        OSError: a folder cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)  # raises FileExistsError where a file is there


def create_file(path: Path) -> None:
    """Creates an empty file with mode 0600; an existing file stays as it is.

    SQLite and ``open`` would create it with a mode that the umask decides. Journals beside a
    database (``-wal``, ``-journal``) take the mode of the database.

    Raises:
        OSError: the file cannot be created.
    """
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))


def check_owner(folder: Path, *files: Path, allow_root: bool = False) -> None:
    """Refuses a session that belongs to another user.

    Call it before anything in the session is acted upon. Reading needs no such check.

    Args:
        folder: the session's.
        files: files of the session that must have the same owner; missing ones are skipped.
        allow_root: whether root may use everybody's sessions.

    Raises:
        SessionError: the session belongs to another user, or its owner cannot be read.
    """
    user = os.geteuid()
    if allow_root and user == 0:
        return
    try:
        # A symbolic link counts by its own owner and by that of its target.
        owners = {folder.lstat().st_uid, folder.stat().st_uid}
        owners |= {file.stat().st_uid for file in files if file.exists()}
        others = owners - {user}
        if not others or others == {_owner_of_new_files(folder)}:
            return
    except OSError as error:
        raise SessionError(f"cannot look into {folder}: {error.strerror}") from error
    raise SessionError(
        f"session '{folder.name}' belongs to {_user_name(min(others))}, and its configuration can "
        "run code: copy the folder to make it yours"
    )


def _owner_of_new_files(folder: Path) -> int | None:
    """Which owner the file system gives to this user's files; None where none can be created.

    Some network file systems and mounts record another user than the one who writes.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"
