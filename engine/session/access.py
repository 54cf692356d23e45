"""Access to files: their modes, how those of a session are opened, and the check of its owner.

A session's configuration can name Python code, so anyone who can write to a session can run code as
the user who resumes it. Modes are therefore set explicitly and do not depend on the umask.
"""

import errno
import getpass
import os
import pwd
import stat
import tempfile
from io import BufferedReader, BufferedWriter
from pathlib import Path

from engine.errors import SessionError

FOLDER_MODE = 0o700
FILE_MODE = 0o600
MAX_BYTES = 1 << 26
"""Maximum size of a file in JSON. A checkpoint's state.json has a line for each file of a model."""


def make_folders(path: Path) -> None:
    """Creates a folder and its missing parents with mode 0700; an existing folder is not changed.

    Raises:
        OSError: a folder cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)  # raises FileExistsError where a file is there


def private_temporary_folder() -> Path:
    """This user's folder under the system's temporary one; nobody else can access it.

    Raises:
        OSError: it cannot be created, or another user has created it.
    """
    folder = Path(tempfile.gettempdir()) / f"rlhf-tui-{os.getuid()}"
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(0, f"{folder} is not private to this user")
    return folder


def user_folder(variable: str, default: str) -> Path:
    """The folder for this software's files of this user; it may not exist yet.

    Args:
        variable: of the XDG base directory specification, such as `XDG_STATE_HOME`.
        default: the base where that is not set, such as `.local/state` in the user's home.
    """
    given = Path(os.environ.get(variable, ""))
    if given.is_absolute():  # the specification says to ignore relative paths
        return given / "rlhf-tui"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd: containers then set HOME to /
        home = Path("/")
    return home / default / "rlhf-tui"


def create_file(path: Path) -> None:
    """Creates an empty file with mode 0600; an existing file stays as it is.

    Call it before SQLite or ``open`` would create the file with a mode that depends on the umask.
    SQLite gives the files beside a database (``-wal``, ``-journal``) the mode of the database.

    Raises:
        OSError: the file cannot be created, or what is there is not a regular file.
    """
    os.close(open_regular(path, os.O_RDONLY | os.O_CREAT))


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a file of a session, and returns its descriptor.

    Whoever can write to a session that is shared, or copied from somebody, can put a named pipe
    there. Opening that would wait for its other end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    except BlockingIOError:
        # Another process has a lease on the file, as an NFS server or Samba for one of its clients.
        # The kernel takes it back while this process waits.
        _check_regular(path, path.stat())
        return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            _check_regular(path, path.stat())
        raise
    try:
        _check_regular(path, os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file; move it away", str(path))


def open_to_read(path: Path) -> BufferedReader:
    """Opens a file of a session for reading, see :func:`open_regular`. Raises OSError."""
    return os.fdopen(open_regular(path), "rb")


def read_bytes(path: Path) -> bytes:
    """The contents of a small file of a session, see :func:`open_regular`.

    Raises:
        OSError: it cannot be read, or has more than :data:`MAX_BYTES`.
    """
    with open_to_read(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES} bytes", str(path))
    return data


def open_to_append(path: Path) -> BufferedWriter:
    """Opens a log of a session, which is created if it is missing. Raises OSError."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def open_to_umask(folder: Path) -> None:
    """Gives a model folder and its files the modes that the umask allows.

    For models outside of sessions. safetensors makes its files private whatever the umask, and a
    copy of a checkpoint's folder is as private as the original.

    Raises:
        OSError: a mode cannot be changed.
    """
    umask = _umask()
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    """This process's umask, read without setting it: other threads may be creating files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    (found,) = (line for line in status.splitlines() if line.startswith("Umask:"))
    return int(found.split()[1], 8)


def check_owner(folder: Path, *files: Path, allow_root: bool = False) -> None:
    """Checks that a session belongs to this user.

    Call it before running or writing a session. Reading a session needs no check.

    Args:
        folder: the session's folder.
        files: files of the session that must belong to this user, too; missing ones are skipped.
        allow_root: whether root passes the check for every session.

    Raises:
        SessionError: the session belongs to another user, or its owner cannot be read.
    """
    user = os.geteuid()
    if allow_root and user == 0:
        return
    try:
        # For a symbolic link, both its own owner and the owner of its target count.
        owners = {folder.lstat().st_uid, folder.stat().st_uid}
        owners |= {file.stat().st_uid for file in files if file.exists()}
        others = owners - {user}
        if not others or others == {_owner_of_new_files(folder)}:
            return
    except OSError as error:
        raise SessionError(f"cannot read {folder}: {error.strerror}") from error
    raise SessionError(
        f"session '{folder.name}' belongs to {_user_name(min(others))}, and its configuration can "
        "run code: copy the folder to make it yours"
    )


def current_user() -> str:
    """The name of this user, `uid-1000` if it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have no passwd entry
        return f"uid-{os.getuid()}"


def _owner_of_new_files(folder: Path) -> int | None:
    """The owner of a file that this user creates in a folder; None if it cannot be created.

    Some network file systems and mounts record an owner other than the user who writes.
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
