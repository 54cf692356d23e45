"""Records the animation of the README: ``python -m scripts.pictures.recording [OUT]``.

Starts the demo in a terminal, steers it as a person would, and writes what was on the screen as an
SVG. Time is compressed: a frame is taken at each step. Takes some minutes.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.pictures.run import PAUSED, ctl, program, step, wait_for_step
from scripts.pictures.svg import Frame, animation
from scripts.pictures.terminal import Terminal

OUT = Path(__file__).parents[2] / "docs" / "screens" / "recording.svg"
SIZE = (110, 32)
COMMAND = f"rlhf-tui demo --name {PAUSED}"
TYPED, STEP, SHORT, LONG = 0.06, 0.22, 1.0, 2.6
"""Seconds of frames: of a typed character, a step, something to notice, something to read."""
BEFORE, AFTER = 26, 44
"""The steps until beta is set, and until its effect is looked at."""


class Recorder:
    """Takes frames of a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.frames: list[Frame] = []

    def take(self, seconds: float, *, settled: bool = False) -> None:
        """Takes a frame that is shown for some seconds."""
        screen = self.terminal.settled() if settled else self.terminal.look()
        self.frames.append(Frame(screen, seconds))

    def type(self, text: str) -> None:
        """Types text, a frame a character."""
        for char in text:
            self.terminal.type(char)
            self.terminal.pause()
            self.take(TYPED)

    def press(self, key: str, seconds: float) -> None:
        """Presses a key and takes a frame of what it does."""
        self.terminal.press(key)
        self.terminal.pause()
        self.take(seconds, settled=True)

    def steps(self, sessions: Path, last: int) -> None:
        """Takes a frame at each step, up to the step `last`."""
        for number in range(step(sessions) + 1, last + 1):
            wait_for_step(sessions, number)
            self.take(STEP)


def record(terminal: Terminal, sessions: Path) -> tuple[list[Frame], int]:
    """Returns the frames, and the number of the one that shows most."""
    recorder = Recorder(terminal)
    terminal.wait_for("$")
    recorder.type(COMMAND)
    recorder.press("Enter", SHORT)
    terminal.wait_for("Dashboard")
    for word in ("load", "generate"):
        terminal.wait_for(word, 180)
        recorder.take(SHORT)
    recorder.steps(sessions, BEFORE)
    recorder.press("b", SHORT)
    recorder.terminal.press("C-u")
    recorder.type("0.4")
    recorder.take(SHORT)
    recorder.press("Enter", LONG)
    recorder.steps(sessions, AFTER)
    poster = len(recorder.frames) - 1
    for key, seconds in keys_after():
        recorder.press(key, seconds)
    return recorder.frames, poster


def keys_after() -> Iterator[tuple[str, float]]:
    """Keys, and the seconds for which their effects are shown."""
    yield from (("N", LONG), ("Escape", STEP))  # the last event: beta was set
    yield from (("3", SHORT), ("j", STEP), ("j", STEP), ("d", LONG), ("v", LONG), ("v", SHORT))
    yield from (("2", SHORT), ("q", LONG))


def main() -> None:
    """Records, and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m scripts.pictures.recording")
    parser.add_argument(
        "out", type=Path, nargs="?", default=OUT, help="default: that of the README"
    )
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        sessions = Path(folder) / "sessions"
        os.environ |= {
            "RLHF_TUI_SESSIONS": str(sessions), "PS1": "$ ", "XDG_CONFIG_HOME": folder,
            "XDG_STATE_HOME": folder, "PATH": f"{Path(program()[0]).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        with Terminal(["bash", "--norc", "--noprofile"], SIZE, "truecolor") as terminal:
            try:
                frames, poster = record(terminal, sessions)
            finally:
                ctl(sessions, "stop", "--now")
    out.write_text(animation(frames, poster))
    subprocess.run(["ls", "-l", str(out)], check=True)


if __name__ == "__main__":
    main()
