"""Starts an engine in the background and waits until it trains or has failed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import NoSuchSessionError, RlhfError, SessionError, UserInputError
from engine.journal.reader import JournalReader
from engine.journal.rows import AlertEvent, ReadyEvent
from engine.launch.environment import LOG_ENCODING
from engine.launch.failed_start import NewSession
from engine.launch.start_options import StartOptions, start_variable
from engine.session import access
from engine.session.folder import SessionFolder
from engine.session.states import LIVE_STATES

POLL_INTERVAL = 0.05
FULL_DISK = 1_000_000
"""Free bytes below which a disk counts as full: neither journal nor log can be written."""


def start_engine(
    session: SessionFolder,
    start: StartOptions,
    *,
    timeout: float,
    notice: Callable[[str], None] = lambda _text: None,
) -> int:
    """Starts an engine that outlives this process, its terminal and its process group.

    Returns when the engine trains, or after `timeout` seconds; the engine then continues to load.

    Args:
        session: its lock must be free.
        start: the first attempt.
        timeout: seconds to wait for the models to be loaded.
        notice: called with the text of each alert and each note on the configuration that is
            recorded before this function returns.

    Returns:
        The engine's process id.

    Raises:
        UserInputError: something that the configuration names cannot be used.
        SessionError: the engine ended before the training began; the message is its reason.
        NoSuchSessionError: the session was deleted meanwhile, such as with `rm` in another shell.
    """
    try:
        return _start(session, start, timeout, notice)
    except FileNotFoundError as error:
        if session.folder.exists():
            raise
        raise NoSuchSessionError(
            f"session '{session.name}' was deleted while it was started; nothing runs"
        ) from error


def _start(
    session: SessionFolder, start: StartOptions, timeout: float, notice: Callable[[str], None]
) -> int:
    attempts, last_event = _attempts(session), _last_event(session)
    log_size = _size(session.log_file)
    # The engine inherits no open file: a script that reads our output must see its end.
    with access.open_to_append(session.log_file) as log:
        process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-P", "-m", "engine", str(session.folder)],
            env=os.environ | LOG_ENCODING | start_variable(start),
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
            _report_notices(session, last_event, notice)
            return _ended(session, code, state, process.pid, log_size)
        engine = session.engine()  # of two that start at once, one is refused
        if state != "starting" and state in LIVE_STATES and engine and engine.pid == process.pid:
            break
        time.sleep(POLL_INTERVAL)
    _report_notices(session, last_event, notice)
    return process.pid


def start_or_remove(
    session: SessionFolder,
    start: StartOptions,
    *,
    timeout: float,
    notice: Callable[[str], None] = lambda _text: None,
) -> int:
    """Like :func:`start_engine`, but removes a new session if the user's input is wrong."""
    new = NewSession(session, start)
    try:
        return start_engine(session, start, timeout=timeout, notice=notice)
    except UserInputError as error:
        new.remove_if_unused(error.exit_code)
        raise


def _ended(session: SessionFolder, code: int, state: str, pid: int, log_size: int) -> int:
    """The process id of a run that has finished already; raises for any other exit code."""
    if code == 0:
        return pid
    with JournalReader(session) as reader:
        message = reader.meta().message
    if not message or state in LIVE_STATES:
        message = _last_line(session, log_size) or _silent_end(session, code)
    error: type[RlhfError] = UserInputError if code == UserInputError.exit_code else SessionError
    raise error(message)


def _last_line(session: SessionFolder, start: int) -> str:
    """The last line that this engine wrote to the log after a byte offset; empty if none."""
    with access.open_to_read(session.log_file) as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").splitlines()
    return lines[-1].removeprefix("rlhf-tui: ") if lines else ""


def _silent_end(session: SessionFolder, code: int) -> str:
    if shutil.disk_usage(session.folder).free < FULL_DISK:
        return f"the disk of {session.folder} is full: free some space, then resume"
    return f"the engine ended with exit code {code} and logged nothing"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_event(session: SessionFolder) -> int:
    with JournalReader(session) as reader:
        return max((e.event for e in reader.events(last=1)), default=0)


def _report_notices(session: SessionFolder, after: int, notice: Callable[[str], None]) -> None:
    """Calls `notice` with the alerts and the notes that were recorded after an event."""
    with JournalReader(session) as reader:
        for event in reader.events(after=after):
            match event.payload:
                case AlertEvent(text=text):
                    notice(text)
                case ReadyEvent(notes=notes):
                    for text in notes:
                        notice(f"note: {text}")


def _attempts(session: SessionFolder) -> int:
    with JournalReader(session) as reader:
        return len(reader.attempts())


def _state(session: SessionFolder) -> str:
    with JournalReader(session) as reader:
        return reader.state()
