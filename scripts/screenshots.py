"""Draws the README's pictures: ``python -m scripts.screenshots SESSIONS NAME [SCREEN]...``.

Opens the dashboard on a session, without a terminal, and writes each screen, or those that are
named, to docs/screens as SVG.
"""

import asyncio
import sys
from pathlib import Path

from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.modes import MODES

FOLDER = Path(__file__).parent.parent / "docs" / "screens"
SIZE = (120, 36)
KEYS = {"samples": [*"jjjjjjjj", "d"]}
"""What is pressed on a screen before it is drawn."""


async def draw(root: Path, name: str, wanted: list[str]) -> None:
    """Each of the screens, once."""
    app = RlhfApp(root, name, read_only=False, follow=False)
    async with app.run_test(size=SIZE) as pilot:
        for key, mode in enumerate(MODES, start=1):
            if mode not in wanted:
                continue
            await pilot.press(str(key))
            await pilot.pause(1.0)
            await pilot.press(*KEYS.get(mode, ()))
            await pilot.pause(1.0)
            app.save_screenshot(f"{mode}.svg", str(FOLDER))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    asyncio.run(draw(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(MODES)))
