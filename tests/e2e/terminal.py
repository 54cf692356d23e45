"""A program on a pseudo-terminal, as a person's terminal would run it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading

ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][0-9A-B]|\x1b."
)
ROWS, COLUMNS = 40, 120


class Terminal:
    """A program on a pseudo-terminal of its own, and everything it ever showed."""

    def __init__(self, lab, *args):
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.raw = b""
        self.process = subprocess.Popen(
            [lab.program, *map(str, args)],
            stdin=side, stdout=side, stderr=side, start_new_session=True,
            env=lab.environment | {"TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(side)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while data := os.read(self._main, 65536):
                self.raw += data
        except OSError:
            return

    def type(self, keys):
        os.write(self._main, keys.encode())

    @property
    def text(self):
        """What was printed, in the order in which it was, without escape sequences."""
        return " ".join(ESCAPES.sub(" ", self.raw.decode(errors="replace")).split())

    def close(self):
        self.process.kill()
        self.process.wait()
