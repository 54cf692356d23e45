"""The folder of a session: its name, its files and its engine."""

import contextlib
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.config.session_file import read_session_text
from engine.errors import (
    ConfigError,
    NoSuchSessionError,
    SessionError,
    SessionLockedError,
    SessionNameError,
)
from engine.examined import examined
from engine.session import access, lock
from engine.session.command_line import command, recorded_command
from engine.session.engine_info import EngineInfo
from engine.session.machine import boot_id, on_network
from engine.session.position import Position

if TYPE_CHECKING:
    from engine.config.schema import RunConfig

LONGEST_PATH = 512 - len("/journal.db-journal")
"""Bytes in the path of a session's folder: SQLite takes 512 for each of its files."""
ENDING = 15.0
"""Seconds to wait for the lock of an engine that was killed: a thread of it may still write."""
FIRST_START = 30.0
"""Seconds from the creation of a session within which its first engine locks it, unless it died."""
SIGN_INTERVAL = 5.0
"""Seconds after which an engine shows machines that do not see its lock that it lives."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class DiskUsage(msgspec.Struct, frozen=True):
    """The disk space that a session's files take, in bytes."""

    size: int
    """All files. Those that a fork shares with its parent by hard links count for both."""
    freed: int
    """The files without other hard links: what deleting the session frees."""


@dataclass(frozen=True)
class SessionFolder:
    """The folder of one run and the paths in it."""

    folder: Path
    position: Position | None = field(default=None, compare=False)
    """The moment of its history at which readers show its files; None: the present."""

    def at(self, position: Position | None) -> "SessionFolder":
        """The same session as it was at a moment of its history, without a live engine."""
        return replace(self, position=position)

    @property
    def name(self) -> str:
        """The name of the session: the folder's name."""
        return self.folder.name

    @property
    def config_file(self) -> Path:
        """The resolved configuration, in YAML."""
        return self.folder / "config.yaml"

    @property
    def journal_file(self) -> Path:
        """Database of metrics, commands, events and checkpoints."""
        return self.folder / "journal.db"

    @property
    def samples_file(self) -> Path:
        """Database of samples and their per-token arrays."""
        return self.folder / "samples.db"

    @property
    def labels_file(self) -> Path:
        """Database of the operators' judgements; created by the first judgement."""
        return self.folder / "labels.db"

    @property
    def log_file(self) -> Path:
        """Output of the ranks and of the supervisor."""
        return self.folder / "engine.log"

    def rollout_log_file(self, engine: int) -> Path:
        """Output of one of the `rollout.engines` processes, counted from 0."""
        return self.folder / ("rollout.log" if engine == 0 else f"rollout-{engine}.log")

    @property
    def engine_file(self) -> Path:
        """Describes the live engine; deleted when it exits."""
        return self.folder / "engine.json"

    @property
    def secret_file(self) -> Path:
        """The secret of a run over several machines; deleted when the engine exits."""
        return self.folder / "join.secret"

    @property
    def lock_file(self) -> Path:
        """Locked while an engine is live."""
        return self.folder / "engine.lock"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def trackers(self) -> Path:
        """Folder of the files of experiment trackers, and of the ids of their runs."""
        return self.folder / "trackers"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard event files."""
        return self.folder / "tb"

    def config(self) -> "RunConfig":
        """Loads the configuration. Raises ConfigError if the file is missing or damaged."""
        # Imported here because importing YAML is slow and most users of a session do not need it.
        from engine.config import file as config_file  # noqa: PLC0415

        try:
            return config_file.load_session(self.config_file)
        except ConfigError as error:  # such as a value that an earlier version accepted
            if str(self.config_file) in str(error):
                raise
            raise ConfigError(f"{self.config_file}: {error}") from None

    def check_config_file(self) -> None:
        """Checks that config.yaml can be read and is not cut off, but not the values in it.

        Raises:
            ConfigError: it is cut off or cannot be read.
        """
        read_session_text(self.config_file)

    def write_config(self, config: "RunConfig") -> None:
        """Replaces config.yaml atomically.

        Call it while holding the session's lock, or before any engine can take it.
        """
        from engine.config import file as config_file  # noqa: PLC0415

        for leftover in self.folder.glob(f".{self.config_file.name}.*"):  # of a killed process
            leftover.unlink(missing_ok=True)
        write_atomically(self.config_file, config_file.dump_session(config))

    def disk_usage(self) -> DiskUsage:
        """The disk space of its files; looks at each of them."""
        size = freed = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # of a checkpoint that is removed
                    found = os.lstat(f"{folder}/{name}")
                    size += found.st_size
                    freed += found.st_size if found.st_nlink == 1 else 0
        return DiskUsage(size, freed)

    def is_live(self) -> bool:
        """Whether an engine holds the session's lock; False for a moment of its history.

        Raises:
            SessionError: the lock cannot be tested.
        """
        return self.position is None and lock.is_held(self.lock_file)

    def may_be_live(self) -> bool:
        """Whether an engine runs the session, or the lock cannot be tested; later reads say why."""
        try:
            return self.is_live()
        except SessionError:
            return True

    def is_being_started(self, last_attempt: float) -> bool:
        """Whether the session is so new that its first engine may not have locked it yet.

        That of a fork begins once its journal is copied, which may take longer than a start.

        Args:
            last_attempt: when the last attempt began that the journal has, a copied one included.
        """
        if self.engine_file.exists():
            return False
        try:
            created = self.config_file.stat().st_mtime
            copied = self.journal_file.stat().st_mtime if self.journal_file.exists() else created
        except OSError:
            return False
        return last_attempt < created and 0 <= time.time() - max(created, copied) < FIRST_START

    def acquire(self, advice: str | None = None) -> lock.SessionLock:
        """Locks the session for one engine, once one that was killed has ended.

        Args:
            advice: what the message tells the user to do if another engine holds the lock; by
                default, to look at its status.

        Raises:
            SessionLockedError: another engine holds the lock; the message names its process.
            SessionError: the session belongs to another user.
        """
        self.check_owner()
        self.wait_for_killed_engine()
        try:
            held = lock.SessionLock(self.lock_file)
        except SessionLockedError:
            engine = self.engine()
            holder = f"pid {engine.pid} on {engine.host}" if engine else "another process"
            raise self._locked(holder, advice) from None
        if (engine := self.engine()) and engine.serves(self.folder):  # engine.lock was deleted
            held.release()
            raise self._locked(f"pid {engine.pid} on {engine.host}", advice)
        return held

    def _locked(self, holder: str, advice: str | None = None) -> SessionLockedError:
        return SessionLockedError(
            f"session '{self.name}' already has an engine ({holder}); "
            + (advice or f"see: {self.command('status')}")
        )

    def show_life(self) -> None:
        """Shows other machines that this engine lives, see :meth:`check_other_machine`."""
        with contextlib.suppress(OSError):
            os.utime(self.engine_file)

    def check_other_machine(self, notice: Callable[[str], None] = lambda _text: None) -> None:
        """Checks that no engine on another machine serves a session whose lock is free here.

        Some network file systems are mounted so that each machine has locks of its own. If
        engine.json is from another machine, which may have the same name, its engine either was
        killed or still changes the file's time: this waits long enough to see that.

        Args:
            notice: called with a sentence before a wait.

        Raises:
            SessionLockedError: its engine lives.
        """
        engine, before = self.engine(), self._sign()
        if engine is None or engine.is_here():
            return
        if engine.host == socket.gethostname() and not on_network(self.folder):
            return  # this machine has been restarted since
        seconds = 2 * SIGN_INTERVAL + 1.0
        holder = f"pid {engine.pid} on {engine.host}"
        notice(f"waiting {seconds:.0f} s to see whether the last engine ({holder}) still lives")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (now := self._sign()) is not None and now != before:
                raise self._locked(f"{holder}, whose lock is not seen here")

    def _sign(self) -> int | None:
        """The time of engine.json, as its file system has it when it is opened; None without it."""
        try:
            with access.open_to_read(self.engine_file) as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def wait_for_killed_engine(self) -> None:
        """Waits, at most :data:`ENDING` seconds, until an engine that was killed has ended.

        Raises:
            SessionError: the lock cannot be tested.
        """
        deadline = time.monotonic() + ENDING
        while self.is_live() and (engine := self.engine()) and engine.is_ending():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)

    def delete(self, held: lock.SessionLock) -> None:
        """Deletes the session with all its files, and releases its lock.

        If it fails, or this process is killed, what is left is still a session that can be listed
        and deleted, because config.yaml goes last.

        Raises:
            OSError: a file cannot be removed, the folder is a symbolic link, or it was replaced
                after it was locked.
        """
        if self.folder.is_symlink():
            raise OSError("it is a symbolic link")
        if not held.is_in_place():
            raise OSError("it was moved or replaced meanwhile, and nothing was deleted")
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (self.config_file, self.lock_file):
                path.unlink()
        self.config_file.unlink(missing_ok=True)
        held.release()  # on NFS an open file keeps its folder from being removed
        shutil.rmtree(self.folder)

    def command(self, verb: str, *words: str) -> str:
        """A command on this session as it can be typed here."""
        return command(verb, self.name, *words, root=self.folder.parent)

    def recorded_command(self, verb: str) -> str:
        """A command on this session for a message of its engine, which may be read elsewhere."""
        return recorded_command(verb, self.name, root=self.folder.parent)

    def check_owner(self, *, allow_root: bool = False) -> None:
        """Checks that the session belongs to this user, see :func:`access.check_owner`.

        Raises:
            SessionError: the session belongs to another user; the message names the owner.
        """
        access.check_owner(self.folder, self.config_file, allow_root=allow_root)

    def engine(self) -> EngineInfo | None:
        """The contents of engine.json, None if missing. They may be stale: see :meth:`is_live`."""
        try:
            content = access.read_bytes(self.engine_file)
            return msgspec.json.decode(content, type=examined(EngineInfo))
        except (OSError, msgspec.DecodeError, RecursionError):
            return None

    def write_engine(self, socket_path: str, version: str) -> None:
        """Writes engine.json for this process."""
        info = EngineInfo(os.getpid(), socket.gethostname(), socket_path, version, boot_id())
        write_atomically(self.engine_file, msgspec.json.encode(info).decode() + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that readers see either the old or the new contents. Its mode is 0600."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)  # of a killed process with the same id
    try:
        access.create_file(part)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def is_name(name: str) -> bool:
    """Whether a session can have this name. A folder may have any other, put there by hand."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Returns the name of a session if it is valid. Raises SessionNameError."""
    if not is_name(name):
        raise SessionNameError(
            f"'{name}' is not a valid session name: use at most 80 letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit"
        )
    return name


def check_path(folder: Path) -> None:
    """Checks that libraries take the path of a session's folder.

    Raises:
        SessionError: the path is not valid UTF-8, or too long.
    """
    length = len(os.fsencode(os.path.realpath(folder)))  # a loop of links is found elsewhere
    if length > LONGEST_PATH:
        raise SessionError(
            f"the path of session '{folder.name}' is too long for SQLite: {length} bytes, at most "
            f"{LONGEST_PATH}; use a folder of sessions with a shorter path (--sessions)"
        )
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise SessionError(
            f"a run cannot write in {folder}: its path is not valid UTF-8; rename the folder, or "
            "choose another one with --sessions"
        ) from None


def create(root: Path, name: str, config: "RunConfig") -> SessionFolder:
    """Creates the folder of a new session, and the folder of sessions if it is missing.

    Raises:
        SessionNameError: the name is invalid or taken.
        SessionError: the folder cannot be created.
    """
    session = SessionFolder(root / check_name(name))
    check_path(session.folder)
    try:
        access.make_folders(root)
        session.folder.mkdir(mode=access.FOLDER_MODE)
        session.checkpoints.mkdir(mode=access.FOLDER_MODE)
        access.create_file(session.log_file)
    except FileExistsError:
        if not root.is_dir():
            raise SessionError(
                f"cannot create a folder of sessions at {root}: it is a file"
            ) from None
        if not session.config_file.exists():  # such as after a kill of a start, or of `rm`
            raise SessionNameError(
                f"{session.folder} exists and is not a session: remove it, or choose another --name"
            ) from None
        raise SessionNameError(
            f"session '{name}' exists in {root}: resume it with {session.command('resume')}, "
            "or choose another --name"
        ) from None
    except OSError as error:
        raise SessionError(f"cannot create {session.folder}: {error.strerror}") from error
    try:
        session.write_config(config)
    except OSError as error:
        shutil.rmtree(session.folder, ignore_errors=True)
        raise SessionError(f"cannot write to {session.folder}: {error.strerror}") from error
    return session


def find(root: Path, name: str, elsewhere: Iterable["SessionFolder"] = ()) -> SessionFolder:
    """Finds an existing session by name.

    Args:
        root: the folder of sessions, searched first.
        name: of the session.
        elsewhere: other sessions to search, such as live ones in other folders.

    Raises:
        NoSuchSessionError: there is no such session.
        SessionNameError: several of `elsewhere` have this name, and a command must not choose one.
        SessionError: this user cannot read the session's folder.
    """
    session = SessionFolder(root / check_name(name))
    try:
        exists = session.config_file.is_file()
    except OSError as error:
        raise SessionError(
            f"cannot read {session.folder}: {error.strerror}; "
            "ask its owner, or choose another folder with --sessions"
        ) from error
    if exists:
        return session
    others = [other for other in elsewhere if other.name == name]
    if len(others) > 1:
        folders = " or ".join(shlex.quote(str(other.folder.parent)) for other in others)
        raise SessionNameError(f"several live sessions are '{name}': add --sessions {folders}")
    if others:
        return others[0]
    listed = command("ls", root=root)
    raise NoSuchSessionError(f"no session '{name}' in {root}; list sessions with: {listed}")


def all_sessions(root: Path) -> list[SessionFolder]:
    """All sessions of a folder, sorted by name."""
    if not root.is_dir():
        return []
    return [SessionFolder(f.parent) for f in sorted(root.glob("*/config.yaml"))]


def free_name(root: Path, stem: str) -> str:
    """A valid name that is not taken: `stem`, else `stem-2`, `stem-3` and so on."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60] or "run"
    name, n = stem, 1
    while (root / name).exists():
        n += 1
        name = f"{stem}-{n}"
    return name
