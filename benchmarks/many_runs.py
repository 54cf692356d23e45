"""Measures replays and many runs at once, in a pseudo-terminal.

    python -m benchmarks.many_runs [--steps 100000] [--runs 50] [--run-steps 10000] [--times 5]

Start of a replay of a long session against that of its dashboard; the session browser of many runs
against that of one; and the time from a key to the screen with ten runs overlaid. Pairs take turns,
ratios are medians over the pairs.
"""

import argparse
import shutil
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.terminal import Screen, has_curves, write_session
from engine.journal.writer import JournalWriter
from engine.session.folder import SessionFolder

METRICS = 40
OVERLAID = 10
MARKER_EVERY = 500
"""Steps between two alerts of the long session."""


def main() -> None:
    """Runs all measurements and prints one result per line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--run-steps", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        measure_replay(home, options.steps, options.times)
        many, one = write_runs(home, options.runs, options.run_steps)
        measure_browser(home, many, one, options.times)
        measure_overlay(home, many)


def program(command: str, *arguments: str) -> list[str]:
    """The command line of the program."""
    return [sys.executable, "-m", "rlhf_tui.cli", command, *arguments]


def pairs(home: Path, times: int, first: list[str], second: list[str],
          shown: tuple[Callable[[bytes], bool], Callable[[bytes], bool]]) -> str:  # fmt: skip
    """Starts two programs in turn until each shows what it should; the medians and the ratio.

    Also of their processor time, which other programs on the machine hardly change.
    """
    took: tuple[list[float], list[float]] = ([], [])
    used: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for number, command in enumerate((first, second)):
            screen = Screen(command, home)
            took[number].append(screen.wait_for(shown[number], 60.0))
            used[number].append(screen.cpu())
            screen.close()
    return f"{compared(took)}; processor {compared(used)}"


def compared(seconds: tuple[list[float], list[float]]) -> str:
    """The medians of two measurements, and the median of their ratios."""
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    a, b = map(statistics.median, seconds)
    return f"{a:.2f} s and {b:.2f} s, {ratio:.2f} x"


# -- a replay --------------------------------------------------------------------------------------


def measure_replay(home: Path, steps: int, times: int) -> None:
    """The dashboard's first frame, and the first frame of a replay with its place in it."""
    session = write_session(home / "long", steps, METRICS)
    add_markers(session, steps)
    root = str(session.folder.parent)
    attach = program("attach", "long", "--sessions", root)
    begins = {"from the start": (), "from half of it": ("--from", str(steps // 2))}
    for words, options in begins.items():
        replay = program("replay", "long", "--sessions", root, *options)
        result = pairs(
            home, times, attach, replay,
            (lambda data: b"Dashboard" in data, lambda data: b" of " in data and b"replay" in data),
        )  # fmt: skip
        print(f"dashboard and replay {words:<16} {result}")


def add_markers(session: SessionFolder, steps: int) -> None:
    """An alert every some steps, at the time of its step."""
    journal = JournalWriter(session)
    for step in range(MARKER_EVERY, steps, MARKER_EVERY):
        journal.record_event("alert", {"rule": "kl_high", "text": f"KL at step {step}"}, step)
    journal.set_meta(state="finished")
    journal.close()
    db = sqlite3.connect(session.journal_file)
    with db:
        db.execute("UPDATE events SET time = 1.7e9 + step")
        db.execute("UPDATE attempts SET started = 1.7e9, ended = 1.7e9 + ?", (steps,))
    db.close()


# -- many runs -------------------------------------------------------------------------------------


def write_runs(home: Path, runs: int, steps: int) -> tuple[Path, Path]:
    """A folder with many runs and one with a single run. Returns both."""
    first = write_session(home / "one", steps, METRICS, "run-00")
    for number in range(runs):
        shutil.copytree(first.folder, home / "many" / f"run-{number:02d}")
    return home / "many", home / "one"


def measure_browser(home: Path, many: Path, one: Path, times: int) -> None:
    """The browser until the rows of all runs are known: the line of the first one is drawn."""

    def listed(data: bytes) -> bool:
        return b"run-00" in data

    browser = [sys.executable, "-m", "rlhf_tui.cli", "--sessions"]
    found = pairs(home, times, [*browser, str(one)], [*browser, str(many)], (listed, listed))
    print(f"browser of one and of many      {found}")


def measure_overlay(home: Path, many: Path) -> None:
    """From a key that moves the crosshair to the changed screen, without and with overlaid runs."""
    screen = Screen(program("attach", "run-00", "--sessions", str(many)), home)
    screen.wait_for(has_curves)
    screen.count(2.0)
    alone = keys(screen)
    for text in (b"O", b"run-0[1-9]|run-10", b"\x01", b"\r"):
        screen.type(text)
        screen.count(0.5)
    screen.count(3.0)
    overlaid = keys(screen)
    screen.close()
    for words, (times, used) in {"alone": alone, f"with {OVERLAID} overlaid": overlaid}.items():
        print(f"key to paint {words:<18} {statistics.median(times):.0f} ms, "
              f"at most {max(times):.0f}; processor {used:.0f} ms a key")  # fmt: skip


def keys(screen: Screen) -> tuple[list[float], float]:
    """Milliseconds from keys that move the crosshair to the first output; of processor time."""
    before = screen.cpu()
    times = [1000 * screen.key(key) for key in (b"g", b"G") * 10]
    return times, 1000 * (screen.cpu() - before) / len(times)


if __name__ == "__main__":
    main()
