"""The app in a terminal of a given size and colours, by tmux."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from scripts.pictures.cells import Cell, cells_of

COLOURS = {
    "truecolor": {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
    "256": {"TERM": "xterm-256color"},
    "16": {"TERM": "xterm-16color"},
    "none": {"TERM": "xterm-256color", "NO_COLOR": "1"},
}
"""The environment by which a program knows its terminal's colours."""
REMOVED = ("COLORTERM", "NO_COLOR", "TERM", "TMUX", "TMUX_PANE", "TEXTUAL_COLOR_SYSTEM")
POLL, STILL, DEADLINE = 0.25, 4, 6.0
"""Seconds between polls, equal polls after which the screen counts as still, maximum wait."""


class Terminal:
    """A program in a tmux server of its own."""

    def __init__(self, command: Sequence[str], size: tuple[int, int], colours: str) -> None:
        """Starts the program.

        Args:
            command: the program and its arguments.
            size: columns and rows.
            colours: a key of :data:`COLOURS`.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-tui-pictures-")
        self._socket = Path(self._folder.name) / "tmux"
        self._configuration = Path(self._folder.name) / "tmux.conf"
        self._configuration.write_text("set -g status off\nset -g escape-time 0\n")
        environment = {k: v for k, v in os.environ.items() if k not in REMOVED} | COLOURS[colours]
        # Otherwise commands on the screen show the paths of this machine.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        if "--sessions" in command:
            environment["RLHF_TUI_SESSIONS"] = command[command.index("--sessions") + 1]
        line = shlex.join(["env", "-i", *(f"{k}={v}" for k, v in environment.items()), *command])
        columns, rows = size
        self._tmux(
            "-f", str(self._configuration), "new-session", "-d",
            "-x", str(columns), "-y", str(rows), line,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["tmux", "-S", str(self._socket), "kill-server"], check=False)
        self._folder.cleanup()

    def press(self, *keys: str) -> None:
        """Presses keys, named as tmux does: `j`, `Enter`, `Escape`, `C-p`."""
        for key in keys:
            # A ; at the end of an argument separates tmux's commands.
            self._tmux("send-keys", r"\;" if key == ";" else key)
            # A program takes a key soon after Escape for the same key with alt.
            time.sleep(0.25 if key == "Escape" else 0.03)

    def type(self, text: str) -> None:
        """Types text."""
        self._tmux("send-keys", "-l", text)

    def pause(self) -> None:
        """Gives the program time to answer a key."""
        time.sleep(POLL)

    def look(self) -> list[list[Cell]]:
        """The screen now, a row of cells per line."""
        return cells_of(self._tmux("capture-pane", "-e", "-N", "-p"))

    def settled(self) -> list[list[Cell]]:
        """The screen once nothing moves."""
        end = time.monotonic() + DEADLINE
        last, same = self.look(), 0
        while same < STILL and time.monotonic() < end:
            time.sleep(POLL)
            now = self.look()
            same = same + 1 if now == last else 0
            last = now
        return last

    def wait_for(self, words: str, seconds: float = 60.0) -> None:
        """Waits until words are on the screen.

        Raises:
            TimeoutError: they were not there in time.
        """
        end = time.monotonic() + seconds
        while words not in text_of(self.look()):
            if time.monotonic() > end:
                raise TimeoutError(f"no {words!r} on the screen:\n{text_of(self.look())}")
            time.sleep(POLL)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *arguments],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout


def text_of(screen: list[list[Cell]]) -> str:
    """The characters of a screen."""
    return "\n".join("".join(cell.text for cell in row) for row in screen)
