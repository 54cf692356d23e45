"""Runs a program in a pseudo-terminal and emulates the terminal's screen."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time

from rich.cells import cell_len

ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][0-9A-B]|\x1b."
)
PIECES = re.compile(rf"{ESCAPES.pattern}|[\x00-\x1f\x7f]|[^\x00-\x1f\x7f]+")
# Makes it the controlling terminal, so that the kernel sends SIGWINCH and SIGHUP to the program.
LOG_IN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
ROWS, COLUMNS = 40, 120
MODES = {
    "?1049": False,
    "?25": True,
    "?1000": False,
    "?1003": False,
    "?1006": False,
    "?2004": False,
}
"""Terminal modes in a shell: alternate screen, cursor, mouse and bracketed paste."""


class Screen:
    """The screen of a terminal, as far as the app uses its escape sequences."""

    def __init__(self, columns, rows):
        self.modes = dict(MODES)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""
        self.resize(columns, rows)

    def resize(self, columns, rows):
        self.cells = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0

    def feed(self, data):
        text = self._rest + self._decode(data)
        # A read may end within a sequence: keep an incomplete sequence for the next one.
        cut = text.rfind("\x1b")
        found = ESCAPES.match(text, cut) if cut >= 0 else None
        whole = cut < 0 or (found is not None and found[0] not in ("\x1b[", "\x1b]"))
        self._rest = "" if whole else text[cut:]
        for piece in PIECES.findall(text if whole else text[:cut]):
            if piece[0] == "\x1b":
                self._apply(piece)
            elif piece == "\r":
                self.x = 0
            elif piece == "\n":
                self.y += 1
            elif piece >= " ":
                self._write(piece)

    def _write(self, text):
        for char in text:
            if self.y < len(self.cells) and self.x < len(self.cells[0]):
                self.cells[self.y][self.x] = char
            self.x += cell_len(char)

    def _apply(self, sequence):
        found = re.fullmatch(r"\x1b\[(\??)([\d;]*)([A-Za-z])", sequence)
        if not found:
            return
        private, numbers, final = found.groups()
        parameters = [int(n or 0) for n in numbers.split(";")]
        if private and final in "hl":
            self.modes |= {f"?{n}": final == "h" for n in parameters if f"?{n}" in MODES}
        elif final == "H":
            self.y, self.x = (max(n, 1) - 1 for n in (*parameters, 1)[:2])
        elif final == "J":
            self.resize(len(self.cells[0]), len(self.cells))

    @property
    def text(self):
        return "\n".join("".join(row) for row in self.cells)


class Terminal:
    """A program in a pseudo-terminal, with its screen and all of its output."""

    def __init__(self, lab, *args, columns=COLUMNS, rows=ROWS, **environment):
        environment = lab.environment | {"TERM": "xterm-256color"} | environment
        for size in ("COLUMNS", "LINES"):  # the size is that of the terminal
            environment.pop(size, None)
        self._main, side = pty.openpty()
        self._screen = Screen(columns, rows)
        self._size(columns, rows)
        self.raw = b""
        self._drawn = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOG_IN, lab.program, *map(str, args)],
            stdin=side, env=environment,
        )  # fmt: skip
        os.close(side)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _size(self, columns, rows):
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self):
        while not self._closed.is_set():
            if not select.select([self._main], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(self._main, 65536)
            except OSError:  # the program has ended
                return
            with self._lock:
                self._drawn = time.monotonic()
                self.raw += data
                self._screen.feed(data)

    def type(self, keys):
        os.write(self._main, keys.encode())

    def resize(self, columns, rows):
        """Resizes the window."""
        with self._lock:
            self._screen.resize(columns, rows)
        self._size(columns, rows)

    def hang_up(self):
        """Drops the connection: the kernel sends SIGHUP, and the output is no longer read."""
        self._closed.set()
        self._reader.join()
        os.close(self._main)

    @property
    def quiet(self):
        """Seconds since the last output."""
        return time.monotonic() - self._drawn

    @property
    def text(self):
        """All output so far, without escape sequences."""
        return " ".join(ESCAPES.sub(" ", self.raw.decode(errors="replace")).split())

    @property
    def screen(self):
        """The current text of the screen, line by line."""
        with self._lock:
            return self._screen.text

    @property
    def restored(self):
        """Whether all modes are as in a shell."""
        with self._lock:
            return self._screen.modes == MODES

    def close(self):
        self.process.kill()
        self.process.wait()
        if not self._closed.is_set():
            self.hang_up()
