"""The terminal going away, or somebody asking the app to: it leaves as with `q`, and soon.

Textual handles neither signal, and where the terminal is gone without one its threads wait for ever
for it. The engine has no part in this.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGHUP, signal.SIGTERM)
SOON = 3.0
"""Seconds to give back a terminal that may not be there any more."""


def on_hang_up(leave: Callable[[int], None]) -> None:
    """Calls `leave` with the exit code when a signal asks for it; needs the running loop."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, leave, 128 + number)


def watch_terminal() -> None:
    """Ends the process soon after the terminal has gone, whatever its threads wait for."""
    terminal = sys.__stdin__.fileno() if sys.__stdin__ is not None else 0
    if os.isatty(terminal):
        threading.Thread(target=_watch, args=(terminal,), daemon=True, name="watch").start()


def _watch(terminal: int) -> None:
    while os.isatty(terminal):
        time.sleep(SOON)
    _end(128 + signal.SIGHUP)


def end_soon(code: int) -> None:
    """Ends the process, if it has not ended by itself by then."""
    threading.Thread(target=_end, args=(code,), daemon=True, name="end").start()


def _end(code: int) -> None:
    time.sleep(SOON)
    os._exit(code)
