"""Makes the screenshots of the pages: ``python -m scripts.screenshots SESSIONS NAME [SCREEN]...``.

Opens the dashboard on a session without a terminal and writes the named screens (all by default) to
docs/screens as SVG, named by the screen. With ``--prefix PAGE`` they are those of another page than
the README: PAGE-SCREEN.svg.
"""

import argparse
import asyncio
import os
from pathlib import Path

from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.modes import MODES

FOLDER = Path(__file__).parent.parent / "docs" / "screens"
SIZE = (120, 36)
KEYS = {"samples": [*"jjjjjjjj", "d"]}
"""Keys to press on a screen before its screenshot."""


async def save_screens(root: Path, name: str, screens: list[str], prefix: str) -> None:
    """Writes a screenshot of each of the screens."""
    os.environ["COLORTERM"] = "truecolor"  # an SVG has all colours, wherever this runs
    app = RlhfApp(root, name, read_only=False, follow=False)
    async with app.run_test(size=SIZE) as pilot:
        for key, mode in enumerate(MODES, start=1):
            if mode not in screens:
                continue
            await pilot.press(str(key))
            await pilot.pause(1.0)
            await pilot.press(*KEYS.get(mode, ()))
            await pilot.pause(1.0)
            app.save_screenshot(f"{prefix}{mode}.svg", str(FOLDER))


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
    asyncio.run(save_screens(given.sessions, given.name, given.screens or list(MODES), prefix))


if __name__ == "__main__":
    main()
