"""The registry of a user's live sessions, so that `ls` and `attach` find them in any folder.

Each session has a small file in ``$XDG_STATE_HOME/rlhf-tui/live`` (default: ``~/.local/state``). An
entry may be stale: whether a session is live depends on its lock alone.
"""

import contextlib
import hashlib
import logging
import os
import socket
from pathlib import Path

from engine.session import access
from engine.session.folder import SessionFolder, write_atomically

log = logging.getLogger("engine")


def _folder() -> Path:
    return access.user_folder("XDG_STATE_HOME", ".local/state") / "live"


def _entry(session: SessionFolder) -> Path:
    return _folder() / hashlib.sha256(os.fsencode(session.folder)).hexdigest()[:24]


def _entries() -> list[Path]:
    """All entries; none if the folder is missing or cannot be read, such as one that sudo made."""
    try:
        return [file for file in _folder().iterdir() if not file.name.startswith(".")]
    except OSError:
        return []


def announce(session: SessionFolder) -> None:
    """Adds a session. If the file cannot be written, a warning is logged and the run continues."""
    try:
        access.make_folders(_folder())
        text = f"{session.folder}\n{socket.gethostname()}\n"  # a path can have further lines
        write_atomically(_entry(session), text)  # others may be reading it
    except OSError as error:
        log.warning("this session will not be listed in other folders: %s", error)


def withdraw(session: SessionFolder) -> None:
    """Removes a session."""
    try:
        _entry(session).unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot remove the session from the list of live sessions: %s", error)


def live_sessions() -> list[SessionFolder]:
    """This user's live sessions on this machine, sorted by name. Deletes stale entries."""
    found = []
    for entry in _entries():
        try:
            text = entry.read_bytes().decode()
        except (OSError, UnicodeDecodeError):  # removed, or of another kind
            continue
        folder, _, host = text.removesuffix("\n").rpartition("\n")
        if host != socket.gethostname():  # a home folder that several machines share
            continue
        session = SessionFolder(Path(folder))
        if session.may_be_live():
            found.append(session)
        else:
            # On a read-only file system the stale entry stays, which does no harm.
            with contextlib.suppress(OSError):
                entry.unlink()
                if session.may_be_live():  # an engine has begun meanwhile; its entry was removed
                    announce(session)
                    found.append(session)
    return sorted(found, key=lambda s: s.name)


def names_of(sessions: list[SessionFolder]) -> str:
    """The names of sessions, with their folders where two have the same: `a, b in /x, b in /y`."""
    names = [session.name for session in sessions]
    return ", ".join(
        s.name if names.count(s.name) == 1 else f"{s.name} in {s.folder.parent}" for s in sessions
    )
