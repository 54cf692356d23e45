"""Draws the README's pictures: ``python -m scripts.screenshots SESSIONS NAME``.

Opens the dashboard on a session, without a terminal, and writes each screen to docs/screens as SVG.
"""

import asyncio
import sys
from pathlib import Path

from rlhf_tui.app import SCREENS, Desk

FOLDER = Path(__file__).parent.parent / "docs" / "screens"
SIZE = (120, 36)


async def draw(root: Path, name: str) -> None:
    """Every screen, once."""
    desk = Desk(root, name, read_only=False, follow=False)
    async with desk.run_test(size=SIZE) as pilot:
        for key, mode in enumerate(SCREENS, start=1):
            await pilot.press(str(key))
            await pilot.pause(1.0)
            desk.save_screenshot(f"{mode}.svg", str(FOLDER))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    asyncio.run(draw(Path(sys.argv[1]), sys.argv[2]))
