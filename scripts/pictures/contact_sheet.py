"""Draws every screen and dialog in every size and colour system, to be looked at.

``python -m scripts.pictures.contact_sheet OUT [--sessions DIR --name NAME] [--size 80x24]...
[--colours 256]... [--screen beta]...`` writes PNG files to OUT, some screens a file. Without
``--sessions`` it first creates a session with a short real run, which takes minutes. Of a given
session it draws a copy without the weights, alone in its folder, so that pressing `+` labels the
copy.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from scripts.pictures.run import PAUSED, paused_run, program
from scripts.pictures.svg import Screen, sheet
from scripts.pictures.terminal import COLOURS, Terminal

SIZES = ((80, 24), (120, 40), (200, 50))
GROUPS = (
    {
        "sessions": "1", "new-demo": "n", "new-run": "<N", "resume": "<G r", "fork": "<f",
        "delete": "<d", "help-sessions": "<?", "dashboard": "<g Enter", "events": "Tab",
        "marker": "<n n", "event": "Enter", "alert": "N N N", "chart": "<z",
        "metrics": "<2 m", "overlays": "<O", "overlay": "Down Enter", "latest": "<v",
        "beta": "<b", "beta-invalid": "x", "settings": "<e", "setting": "Enter", "note": "<w",
        "probe": "<x", "stop": "<S", "help": "<?", "palette": "<C-p", "machine": "<v",
        "checkpoints": "<4", "roll-back": "r", "fork-checkpoint": "<f", "export": "<E",
        "log": "<5", "log-search": "/ s t e p Enter",
    },
    {
        "samples": "3", "sample-note": "W", "judged": "<+", "help-samples": "<?",
        "compare": "<d", "full-screen-compare": "z", "full-screen": "<z", "same-prompt": "<=",
        "probes": "<P", "probe-shown": "Enter", "held-out": "<E", "tokens-kl": "<E G v",
        "tokens-logprob": "v", "tokens-advantage": "v", "tokens-value": "v",
        "filter": "v / g r e a t", "filtered": "Enter",
    },
)  # fmt: skip
"""Keys that lead from one screen to the next, as :meth:`Terminal.press` takes them; `<` leaves what
is open. Each group has an app of its own."""
SCREENS = [name for group in GROUPS for name in group]
PER_SHEET = {80: 12, 120: 6, 200: 4}
COLUMNS = {80: 3, 120: 2, 200: 2}
LEAVE = ("Escape",) * 3
NOT_COPIED = shutil.ignore_patterns("*.safetensors", "*.sock", "engine.json", "engine.lock")
"""Of a session: weights, which no screen shows, and what belongs to a live engine."""


def screens(
    sessions: Path, name: str, size: tuple[int, int], colours: str, wanted: list[str]
) -> dict[str, Screen]:
    """The wanted screens of an app in one terminal."""
    found: dict[str, Screen] = {}
    command = program("attach", name, "--sessions", str(sessions))
    for group in GROUPS:
        if not set(group) & set(wanted):
            continue
        with Terminal(command, size, colours) as app:
            app.wait_for("step")
            app.settled()
            for each, keys in group.items():
                if keys.startswith("<"):
                    app.press(*LEAVE)
                for key in keys.removeprefix("<").split():
                    app.press(key)
                screen = app.settled()
                if each in wanted:
                    found[f"{each} {size[0]}x{size[1]} {colours}"] = screen
    return found


def save_png(svg: str, path: Path, zoom: float = 1.0) -> None:
    """Writes an SVG document as PNG."""
    subprocess.run(
        ["rsvg-convert", "--zoom", str(zoom), "--output", str(path)],
        input=svg, text=True, check=True,
    )  # fmt: skip


def _size(word: str) -> tuple[int, int]:
    width, height = word.split("x")
    return int(width), int(height)


def _draw(out: Path, sessions: Path, name: str, chosen: argparse.Namespace) -> None:
    names = chosen.screen or SCREENS
    for size in chosen.size or SIZES:
        for colours in chosen.colours or COLOURS:
            found = list(screens(sessions, name, size, colours, names).items())
            each = PER_SHEET.get(size[0], 4)
            for i in range(0, len(found), each):
                path = out / f"{size[0]}x{size[1]}-{colours}-{i // each + 1}.png"
                save_png(sheet(dict(found[i : i + each]), COLUMNS.get(size[0], 2)), path)
                print(path)


def main() -> None:
    """Parses the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sessions", type=Path)
    parser.add_argument("--name", default=PAUSED)
    parser.add_argument("--size", action="append", default=[], type=_size, metavar="WxH")
    parser.add_argument("--colours", action="append", default=[], choices=list(COLOURS))
    parser.add_argument("--screen", action="append", default=[], choices=SCREENS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.sessions:
            source = chosen.sessions / chosen.name
            shutil.copytree(source, Path(folder, chosen.name), ignore=NOT_COPIED)
            _draw(chosen.out, Path(folder), chosen.name, chosen)
            return
        with paused_run(Path(folder)) as sessions:
            _draw(chosen.out, sessions, PAUSED, chosen)


if __name__ == "__main__":
    main()
