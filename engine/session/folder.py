"""A session: one run's folder, its name, its files and who is in it."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import NoSuchSessionError, SessionError, SessionLockedError, SessionNameError
from engine.session import access, lock

if TYPE_CHECKING:
    from engine.config.schema import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class EngineInfo(msgspec.Struct, frozen=True):
    """`engine.json`: the living engine of a session."""

    pid: int
    host: str
    socket: str
    version: str


@dataclass(frozen=True)
class Session:
    """The folder of one run and the names of what lies in it."""

    folder: Path

    @property
    def name(self) -> str:
        """What the operator calls it."""
        return self.folder.name

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def journal_file(self) -> Path:
        """Metrics, commands, events, checkpoints."""
        return self.folder / "journal.db"

    @property
    def samples_file(self) -> Path:
        """Samples and per-token arrays."""
        return self.folder / "samples.db"

    @property
    def labels_file(self) -> Path:
        """The operators' judgements; there from the first one on."""
        return self.folder / "labels.db"

    @property
    def log_file(self) -> Path:
        """What the ranks and the supervisor printed."""
        return self.folder / "engine.log"

    @property
    def engine_file(self) -> Path:
        """There while an engine lives."""
        return self.folder / "engine.json"

    @property
    def lock_file(self) -> Path:
        """Locked while an engine lives."""
        return self.folder / "engine.lock"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard event files."""
        return self.folder / "tb"

    def config(self) -> "RunConfig":
        """The run's configuration. Raises ConfigError when it was damaged."""
        # Reading YAML takes its time to be imported, and most who know a session never do.
        from engine.config import file as config_file  # noqa: PLC0415

        return config_file.load(self.config_file)

    def write_config(self, config: "RunConfig") -> None:
        """Replaces config.yaml, whole or not at all."""
        from engine.config import file as config_file  # noqa: PLC0415

        write_atomically(self.config_file, config_file.dump(config))

    def is_live(self) -> bool:
        """Whether an engine holds this session now."""
        return lock.is_held(self.lock_file)

    def acquire(self) -> lock.SessionLock:
        """Takes the session for one engine.

        Raises:
            SessionLockedError: names the engine that has it.
            SessionError: the session belongs to another user.
        """
        self.check_owner()
        try:
            return lock.SessionLock(self.lock_file)
        except SessionLockedError:
            engine = self.engine()
            who = f"pid {engine.pid} on {engine.host}" if engine else "another process"
            raise SessionLockedError(
                f"session '{self.name}' already has an engine ({who}); "
                f"look with: rlhf-tui status {self.name}"
            ) from None

    def check_owner(self, *, allow_root: bool = False) -> None:
        """Refuses a session that belongs to another user, see :func:`access.check_owner`.

        Raises:
            SessionError: it names the owner.
        """
        access.check_owner(self.folder, self.config_file, allow_root=allow_root)

    def engine(self) -> EngineInfo | None:
        """Who engine.json says lives here; it may be stale, :meth:`is_live` knows."""
        try:
            return msgspec.json.decode(self.engine_file.read_bytes(), type=EngineInfo)
        except (OSError, msgspec.DecodeError):
            return None

    def write_engine(self, socket_path: str, version: str) -> None:
        """Announces this process as the session's engine."""
        info: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "socket": socket_path,
            "version": version,
        }
        write_atomically(self.engine_file, json.dumps(info) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old one or the new one, never half."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)  # left by a process that was killed
    access.create_file(part)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def check_name(name: str) -> str:
    """The name, if it can be one. Raises SessionNameError."""
    if not _NAME.fullmatch(name):
        raise SessionNameError(
            f"'{name}' cannot name a session: use letters, digits, '.', '_' and '-', at most 80, "
            "beginning with a letter or digit"
        )
    return name


def create(root: Path, name: str, config: "RunConfig") -> Session:
    """Makes the folder of a new session.

    Raises:
        SessionNameError: the name cannot be used or is taken.
        SessionError: the folder cannot be made.
    """
    session = Session(root / check_name(name))
    try:
        access.make_folders(root)
        session.folder.mkdir(mode=access.FOLDER_MODE)
        session.checkpoints.mkdir(mode=access.FOLDER_MODE)
        access.create_file(session.log_file)
    except FileExistsError:
        if not root.is_dir():
            raise SessionError(
                f"cannot make a sessions folder at {root}: a file is there"
            ) from None
        raise SessionNameError(
            f"session '{name}' exists in {root}: resume it with rlhf-tui resume {name}, "
            "or give another --name"
        ) from None
    except OSError as error:
        raise SessionError(f"cannot make {session.folder}: {error.strerror}") from error
    try:
        session.write_config(config)
    except OSError as error:
        shutil.rmtree(session.folder, ignore_errors=True)
        raise SessionError(f"cannot write in {session.folder}: {error.strerror}") from error
    return session


def find(root: Path, name: str, elsewhere: Iterable["Session"] = ()) -> Session:
    """An existing session of a folder, or else of those that live elsewhere.

    Raises:
        NoSuchSessionError: there is none.
        SessionError: this user may not look into its folder.
    """
    session = Session(root / check_name(name))
    try:
        there = session.config_file.is_file()
    except OSError as error:
        raise SessionError(
            f"cannot look into {session.folder}: {error.strerror}; "
            "ask who owns it, or give another folder with --sessions"
        ) from error
    if not there:
        for other in elsewhere:
            if other.name == name:
                return other
        raise NoSuchSessionError(f"no session '{name}' in {root}; rlhf-tui ls shows what there is")
    return session


def all_sessions(root: Path) -> list[Session]:
    """Every session of a folder, by name."""
    if not root.is_dir():
        return []
    return [Session(f.parent) for f in sorted(root.glob("*/config.yaml"))]


def free_name(root: Path, stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3` … where it is taken."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60] or "run"
    name, n = stem, 1
    while (root / name).exists():
        n += 1
        name = f"{stem}-{n}"
    return name
