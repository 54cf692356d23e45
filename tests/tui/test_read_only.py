"""With --read-only no screen offers what is off, and each of its keys says so."""

import pytest

from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.status_lines import StatusLine
from tests.tui.panels import make_state, text
from tests.tui.screen import notices


@pytest.mark.parametrize(
    ("screen", "keys"), [("1", "nrfdp"), ("3", "+-!Wyop"), ("4", "rfEp"), ("5", "pS")]
)
async def test_a_key_that_is_off_is_not_offered_and_says_read_only(
    run_app, engine, until, screen, keys
):
    async with run_app(read_only=True) as (app, pilot):
        await pilot.press(screen)
        for key in keys:
            await pilot.press(key)
            await until(pilot, lambda: notices(app), f"a notice for {key}")
            assert all(notice.startswith("read-only: ") for notice in notices(app))
            app.clear_notifications()
            await until(pilot, lambda: not notices(app))
        line = app.screen.query_one(KeyFooter).text()
        assert line.endswith("read-only  ? help")
        footer = set(line.split())
        assert not footer & {"fork", "delete", "export", "pause", "resume", "beta", "good", "stop"}
        assert engine == []


def test_the_top_line_of_a_paused_run_offers_no_key():
    line = StatusLine(make_state(state="paused"))
    line.read_only = True
    assert "unpauses" not in text(line)
