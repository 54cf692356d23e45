"""What a person reads on the app's screen, and opens there."""

import contextlib

from rlhf_tui.widgets.table import Table
from tests.tui.conftest import wait_until


def notices(app):
    """The notices in sight, oldest first."""
    return [str(toast.render()) for toast in app.screen.query("Toast")]


def cells(table, index):
    """A table row's cells, as in a terminal in which all columns have room."""
    return [text.strip() for text, _ in table.row(index, 200)[1::2]]


async def press_for(pilot, screen, *keys):
    """Presses keys and waits for the screen or dialog that they open."""
    await pilot.press(*keys)
    await wait_until(pilot, lambda: isinstance(pilot.app.screen, screen), screen.__name__)


@contextlib.asynccontextmanager
async def opened(run_app, until, key, count):
    """The app on the screen of a key, whose table has so many rows."""
    async with run_app() as (app, pilot):
        await pilot.press(key)
        await until(pilot, lambda: app.screen.query_one(Table).count() == count, "the table")
        yield app, pilot
