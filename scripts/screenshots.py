"""Makes the screenshots of the pages: ``python -m scripts.screenshots SESSIONS NAME [SCREEN]...``.

Opens the app on a session in a terminal and writes the named screens (all by default) to
docs/screens as SVG, named by the screen. With ``--prefix PAGE`` they are those of another page than
the README: PAGE-SCREEN.svg.
"""

import argparse
from pathlib import Path

from rlhf_tui.screens.modes import MODES
from scripts.pictures.run import program
from scripts.pictures.svg import picture
from scripts.pictures.terminal import Terminal

FOLDER = Path(__file__).parent.parent / "docs" / "screens"
SIZE = (120, 36)
KEYS = {"samples": [*"jjjjjjjj", "d"]}
"""Keys to press on a screen before its screenshot."""


def save_screens(root: Path, name: str, screens: list[str], prefix: str) -> None:
    """Writes a screenshot of each of the screens."""
    command = program("attach", name, "--sessions", str(root))
    with Terminal(command, SIZE, "truecolor") as app:
        app.wait_for("step")
        app.settled()
        app.press("Escape")  # the digest of what happened meanwhile
        for key, mode in enumerate(MODES, start=1):
            if mode not in screens:
                continue
            app.press(str(key))
            app.settled()
            app.press(*KEYS.get(mode, ()))
            path = FOLDER / f"{prefix}{mode}.svg"
            path.write_text(picture(app.settled()), encoding="utf-8")
            print(path)


def main() -> None:
    """Parses the arguments and writes the files."""
    parser = argparse.ArgumentParser(prog="python -m scripts.screenshots", description=__doc__)
    parser.add_argument("sessions", type=Path)
    parser.add_argument("name")
    parser.add_argument("screens", nargs="*", metavar="SCREEN")
    parser.add_argument("--prefix")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    prefix = f"{given.prefix}-" if given.prefix else ""
    save_screens(given.sessions.resolve(), given.name, given.screens or list(MODES), prefix)


if __name__ == "__main__":
    main()
