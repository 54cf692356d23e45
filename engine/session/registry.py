"""The user's live sessions, wherever they lie: lets `ls` and `attach` find one started elsewhere.

One small file a session under ``$XDG_STATE_HOME/rlhf-tui/live`` (``~/.local/state`` where that is
not set). It is a hint, never the truth: a session's lock says whether it lives.
"""

import contextlib
import hashlib
import logging
import os
import socket
from pathlib import Path

from engine.session import access
from engine.session.folder import Session

log = logging.getLogger("engine")


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "rlhf-tui" / "live"


def _entry(session: Session) -> Path:
    return _folder() / hashlib.sha256(os.fsencode(session.folder)).hexdigest()[:24]


def announce(session: Session) -> None:
    """Enters a session. A home that cannot be written costs the convenience, not the run."""
    try:
        access.make_folders(_folder())
        text = f"{session.folder}\n{socket.gethostname()}\n"
        access.create_file(_entry(session))
        _entry(session).write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("this session will not be found from other folders: %s", error)


def withdraw(session: Session) -> None:
    """Takes a session out again."""
    try:
        _entry(session).unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot withdraw the session: %s", error)


def live_sessions() -> list[Session]:
    """Those of this user that live now, by name; entries that went stale are cleared away."""
    found = []
    for entry in _folder().glob("*") if _folder().is_dir() else ():
        try:
            folder, host = entry.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError, ValueError):  # withdrawn or written this moment
            continue
        if host != socket.gethostname():  # a home that several machines share
            continue
        session = Session(Path(folder))
        if session.is_live():
            found.append(session)
        else:
            # A home that cannot be written keeps a stale entry, and that does no harm.
            with contextlib.suppress(OSError):
                entry.unlink()
    return sorted(found, key=lambda s: s.name)
