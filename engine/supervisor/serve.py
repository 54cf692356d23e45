"""Runs the supervisor of one session: its lock, its journal, its socket, and the signals.

The same coroutine runs in the foreground and in the background.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine import __version__
from engine.config import file as config_file
from engine.config.deadline import deadline
from engine.config.schema import RunConfig
from engine.errors import SessionError, UserInputError
from engine.journal.fork import unfinished_copies
from engine.journal.writer import JournalWriter
from engine.launch.start_checkpoints import resumable_checkpoints
from engine.launch.start_options import StartOptions
from engine.protocol import sockets
from engine.session import registry
from engine.session.folder import SessionFolder
from engine.session.lock import SessionLock
from engine.supervisor.keep_lock import keep_lock
from engine.supervisor.publisher import Observer
from engine.supervisor.supervisor import Supervisor
from engine.supervisor.threads import in_daemon_thread

log = logging.getLogger("engine")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CANCEL_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""After the end of a run these end the wait for notifications; SIGUSR1 leaves time for them."""


async def supervise(
    session: SessionFolder, start: StartOptions, observer: Observer | None = None
) -> int:
    """Runs a session until its end.

    Args:
        session: its lock must be free.
        start: the first attempt.
        observer: notified of states, alerts and messages, in this process.

    Returns:
        The exit code: 0 if finished or stopped, `launch.preempted_exit` if stopped by a scheduler's
        signal, 1 if failed, 2 if the user's input is wrong.

    Raises:
        SessionLockedError: another engine holds the session.
        SessionError: another engine has run since a resume was prepared, or a file or the socket
            cannot be created or written.
    """
    lock = session.acquire()
    try:
        # In a thread: ctrl+c ends the wait.
        await in_daemon_thread(partial(session.check_other_machine, log.warning))
        with _open_folder(session.folder) as folder:
            for file in unfinished_copies(session):
                _remove(str(file))
            journal = JournalWriter(session)
            try:
                _check_choices(session, journal, start)
                return await _serve(session, lock, journal, start, observer)
            finally:
                try:
                    journal.close()
                except sqlite3.Error as error:  # what the run has come to matters more
                    log.warning("cannot record when the attempt ended: %s", error)
                for file in (session.engine_file, session.secret_file):
                    _remove(file.name, folder)
    except (OSError, sqlite3.Error) as error:
        # SQLite does not name its file, and other errors are not always of this folder.
        failed = "write in" if isinstance(error, sqlite3.Error) else "run the session in"
        raise SessionError(
            f"cannot {failed} {session.folder}: {error}; "
            f"solve this, then: {session.recorded_command('resume')}"
        ) from error
    finally:
        lock.release()


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    """A file descriptor of a folder: what is removed through it is in the folder, even if moved."""
    folder = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield folder
    finally:
        os.close(folder)


def _check_choices(session: SessionFolder, journal: JournalWriter, start: StartOptions) -> None:
    """Checks, with the session locked, that what a resume has chosen still holds.

    Raises:
        SessionError: another engine has run the session, or its checkpoint was deleted, since.
    """
    if start.after_attempt is not None and start.after_attempt != journal.attempt:
        raise SessionError(
            f"another engine has run session '{session.name}' since this resume began; nothing was "
            f"changed; look at it ({session.command('status')}) before you resume again"
        )
    if start.from_step and start.from_step not in (steps := resumable_checkpoints(session)):
        left = ", ".join(map(str, steps)) or "none"
        raise SessionError(
            f"the checkpoint of step {start.from_step} of session '{session.name}' was deleted "
            f"since this resume began; nothing was changed; choose another one (it has: {left})"
        )


async def _serve(
    session: SessionFolder,
    lock: SessionLock,
    journal: JournalWriter,
    start: StartOptions,
    observer: Observer | None,
) -> int:
    """Runs all attempts, with the socket open and the session in the registry."""
    before = session.config()
    config = config_file.override(before, start.overrides)
    _use(config, session, journal)
    journal.set_meta(deadline=deadline(config.train, os.environ), exit_code=None)
    journal.commands.reject_unfinished("the engine ended before it was carried out")
    listener, path = sockets.listen(session.folder)
    try:
        supervisor = Supervisor(session, config, journal, path, start, observer)
        session.write_engine(str(path), __version__)
        registry.announce(session)
        journal.begin_serving()
        keeping = asyncio.create_task(keep_lock(session, lock, journal))
        try:
            code = await _run(supervisor, listener)
        finally:
            keeping.cancel()
    except UserInputError:
        _use(before, session, journal)
        raise
    finally:
        listener.close()
        if journal.is_in_place():
            _remove(str(path))
            registry.withdraw(session)
    if code == UserInputError.exit_code:  # the next resume uses the previous one
        _use(before, session, journal)
    return code


def _use(config: RunConfig, session: SessionFolder, journal: JournalWriter) -> None:
    """Writes config.yaml, and to the journal what lists show, because YAML is slow to read."""
    session.write_config(config)
    journal.set_meta(total_steps=config.train.steps, best_metric=config.train.best_metric)


def _remove(file: str, folder: int | None = None) -> None:
    """Removes a file of an engine that ends; only logs a failure, so as not to hide the run's.

    With `folder`, a file descriptor, `file` is a name in that folder.
    """
    try:
        os.unlink(file, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:  # such as a disk that has become read-only
        log.warning("cannot remove %s: %s", file, error.strerror)


async def _run(supervisor: Supervisor, listener: socket.socket) -> int:
    """Runs all attempts with the server, the watchdog and the signals."""
    await supervisor.server.start(
        listener, supervisor.commands, supervisor, supervisor.rank_messages.handle_connection
    )
    watchdog = asyncio.create_task(
        supervisor.watchdog.run(supervisor.on_silence, supervisor.commands.on_alert)
    )
    watchdog.add_done_callback(supervisor.on_watchdog_end)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, supervisor.commands.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    try:
        supervisor.rollout.listen()
        return await supervisor.run()
    finally:
        for number in CANCEL_SIGNALS:
            loop.add_signal_handler(number, supervisor.publisher.cancel_notifications)
        watchdog.cancel()
        supervisor.ranks.kill()
        await supervisor.rollout.close()
        supervisor.server.close()
        await asyncio.gather(watchdog, supervisor.publisher.finish(), return_exceptions=True)
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)
