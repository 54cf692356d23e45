"""Any keys, in any order and pace: the app stays up, or it was told to quit."""

import random

import pytest

from tests.tui.conftest import judge

KEYS = [
    *"abcdefghijklmnopqrstuvwxyzABEGHIJKLNOPRSTU0123456789/?[]{}<>=+-,.:",
    "enter", "escape", "tab", "shift+tab", "up", "down", "left", "right", "home", "end",
    "pageup", "pagedown", "space", "backspace", "delete", "f1", "ctrl+p", "ctrl+u", "ctrl+w",
    "\x1b", "é", "漢", "ctrl+@",
]  # fmt: skip
LEAVE = ("q", "ctrl+c")
COUNT = 50


async def press_all(app, running, keys):
    async with running(app) as pilot:
        for key in keys:
            if app.exit_message or not app.is_running:
                break
            await pilot.press(*key)
        await pilot.pause()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_any_keys_leave_the_app_up(make_app, session_maker, tmp_path, running, seed):
    rng = random.Random(seed)  # noqa: S311 - reproducible
    root = tmp_path / "own"  # some of the keys judge responses
    session = session_maker(root)
    judge(session)
    app = make_app(session.name if seed % 3 else None, root=root)
    keys = [key for key in KEYS if key not in LEAVE and key != "q"]
    # Some at once, as a terminal that pastes or a connection that lags delivers them.
    bursts = [rng.choices(keys, k=rng.choice((1, 1, 2, 8))) for _ in range(COUNT)]
    await press_all(app, running, bursts)
