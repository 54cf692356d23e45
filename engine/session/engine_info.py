"""The engine of a session, as `engine.json` describes it."""

import os
import signal
import socket
from pathlib import Path

import msgspec

from engine.session.machine import boot_id

SUPERVISORS = {b"engine", b"rlhf_tui.headless"}
"""The modules of the processes that serve a session, with its folder as an argument."""


class EngineInfo(msgspec.Struct, frozen=True):
    """Contents of `engine.json`, which describes the live engine of a session."""

    pid: int
    host: str
    socket: str
    version: str
    boot: str = ""
    """The :func:`boot_id` of its machine, since several may have one name; "" if unknown."""

    def is_here(self) -> bool:
        """Whether the engine is of this machine, since its last start."""
        return self.host == socket.gethostname() and self.boot in ("", boot_id())

    def is_ending(self) -> bool:
        """Whether the engine, on this machine, has ended or is being killed.

        The kernel keeps its files open until its last thread has ended, which waits for the disk.
        """
        if not self.is_here():
            return False
        try:
            text = Path(f"/proc/{self.pid}/status").read_text("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        killed = int(status.get("SigPnd", "0"), 16) >> (signal.SIGKILL - 1) & 1
        return bool(killed) or status.get("State", "")[:1] in ("Z", "X")

    def serves(self, folder: Path) -> bool:
        """Whether its process, on this machine, is another one than this and serves a session."""
        if not self.is_here() or self.pid == os.getpid():
            return False
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        of_folder = any(w and os.path.realpath(w) == os.fsencode(folder.resolve()) for w in words)
        return of_folder and not SUPERVISORS.isdisjoint(words)
