"""Starts an engine in the background and waits until it stands on its own feet."""

import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from engine.errors import RlhfError, SessionError, UserInputError
from engine.journal.reader import JournalReader
from engine.launch.start import StartOptions
from engine.session.folder import Session
from engine.session.states import LIVE_STATES

POLL_INTERVAL = 0.05


def start_engine(
    session: Session,
    start: StartOptions,
    *,
    timeout: float,
    waiting: Callable[[str], None] = lambda _state: None,
) -> int:
    """An engine that outlives this process, its terminal and its process group.

    Waits until it trains, until it fails, or for `timeout` seconds (loading goes on behind).

    Args:
        session: whose engine.
        start: where from.
        timeout: seconds to wait for the models to be loaded.
        waiting: called with the state now and then.

    Returns:
        The engine's process id.

    Raises:
        UserInputError: what the configuration names cannot be used.
        SessionError: it ended before it began; the message says why.
    """
    attempts = _attempts(session)
    text = msgspec.json.encode(start).decode()
    # Nothing of the caller's is kept open: a script that reads our output must see its end.
    with session.log_file.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "engine", str(session.folder), text],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
        )
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        code = process.poll()
        state = _state(session) if _attempts(session) > attempts else "starting"
        if code is not None:
            return _ended(session, code, state, process.pid)
        if state != "starting" and state in LIVE_STATES:
            break
        waiting(state)
        time.sleep(POLL_INTERVAL)
    return process.pid


def _ended(session: Session, code: int, state: str, pid: int) -> int:
    """A very short run may be over already; anything else is an error."""
    if code == 0:
        return pid
    with JournalReader(session) as record:
        message = record.meta().message
    if not message or state in LIVE_STATES:
        lines = session.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        message = lines[-1].removeprefix("rlhf-tui: ") if lines else f"it ended with {code}"
    kinds: dict[int, type[RlhfError]] = {2: UserInputError}
    raise kinds.get(code, SessionError)(message)


def _attempts(session: Session) -> int:
    with JournalReader(session) as record:
        return len(record.attempts())


def _state(session: Session) -> str:
    with JournalReader(session) as record:
        return record.state()
