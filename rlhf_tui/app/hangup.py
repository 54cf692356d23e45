"""Ends the app when its terminal disappears or a signal asks for it.

Textual handles neither SIGHUP nor SIGTERM. If the terminal disappears without a signal, the threads
of Textual wait for it forever. The engine is not affected.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGHUP, signal.SIGTERM)
EXIT_TIMEOUT = 3.0
"""Seconds within which the terminal must be restored."""


def on_hang_up(leave: Callable[[int], None]) -> None:
    """Calls `leave` with the exit code on SIGHUP or SIGTERM. Call it in the running event loop."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, leave, 128 + number)


def watch_terminal() -> None:
    """Ends the process within seconds after the terminal has disappeared."""
    terminal = sys.__stdin__.fileno() if sys.__stdin__ is not None else 0
    if os.isatty(terminal):
        threading.Thread(target=_watch, args=(terminal,), daemon=True, name="watch").start()


def _watch(terminal: int) -> None:
    while os.isatty(terminal):
        time.sleep(EXIT_TIMEOUT)
    _end(128 + signal.SIGHUP)


def end_soon(code: int) -> None:
    """Ends the process after :data:`EXIT_TIMEOUT`, unless it ends by itself before."""
    threading.Thread(target=_end, args=(code,), daemon=True, name="end").start()


def _end(code: int) -> None:
    time.sleep(EXIT_TIMEOUT)
    os._exit(code)
