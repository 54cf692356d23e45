"""The screen that docs/contributing.md adds as an example."""

import sys
from functools import partial
from types import ModuleType

from rlhf_tui.screens import modes
from rlhf_tui.widgets.table import Table
from tests.docs.pages import ROOT, blocks

(CODE,) = [
    block
    for block in blocks(ROOT / "docs" / "contributing.md", "python")
    if block.startswith("# rlhf_tui/screens/alerts.py")
]


async def test_the_screen_of_the_page_shows_the_alerts_and_moves_the_crosshair(
    make_app, running, until, monkeypatch
):
    module = ModuleType("rlhf_tui.screens.alerts")
    exec(CODE, vars(module))  # noqa: S102 - ours
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(modes.MODES, "alerts", "AlertsScreen")
    app = make_app()
    app.add_mode("alerts", partial(modes.create_screen, "alerts"))
    async with running(app) as pilot:
        await app.run_action("go('alerts')")
        await until(pilot, lambda: app.current_mode == "alerts", "the screen")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: "140 kl-runaway" in table.text(), "the alert")
        await pilot.press("enter")
        await until(pilot, lambda: app.view.cursor == 140, "the crosshair")
