"""Makes the README's screenshots: ``python -m scripts.screenshots SESSIONS NAME [SCREEN]...``.

Opens the dashboard on a session without a terminal and writes the named screens (all by default) to
docs/screens as SVG.
"""

import asyncio
import os
import sys
from pathlib import Path

from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.modes import MODES

FOLDER = Path(__file__).parent.parent / "docs" / "screens"
SIZE = (120, 36)
KEYS = {"samples": [*"jjjjjjjj", "d"]}
"""Keys to press on a screen before its screenshot."""


async def save_screens(root: Path, name: str, screens: list[str]) -> None:
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
            app.save_screenshot(f"{mode}.svg", str(FOLDER))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    asyncio.run(save_screens(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(MODES)))
