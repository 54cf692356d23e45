"""The preview of the highlighted session, and where there is room for it."""

import threading

import pytest
from msgspec.structs import replace

from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.parts import highlighted_preview
from rlhf_tui.screens.sessions import SessionsScreen
from rlhf_tui.state.runs.session_preview import Difference, SessionPreview, read_preview
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.panels.preview import PreviewNotes, PreviewSamples
from rlhf_tui.widgets.table import Table
from tests.tui.conftest import config_of
from tests.tui.panels import lines_of, make_state
from tests.tui.screen import cells


@pytest.fixture
def folder(session_maker, tmp_path):
    """Two sessions, of which `other` has another clip range; and one that cannot be read."""
    root = tmp_path / "sessions"
    for name, steps in (("frozen", 4), ("other", 3), ("torn", 4)):
        session_maker(root, name, steps)
    (root / "other" / "config.yaml").unlink()
    session = session_maker(tmp_path / "made", "other", 4)
    session.write_config(config_of(**{"train.steps": 4, "reward.batch_size": 8}))
    (root / "other" / "config.yaml").write_text(session.config_file.read_text())
    (root / "torn" / "journal.db").write_bytes(b"not a database" * 99)
    return root


async def highlight(pilot, until, app, name):
    table = app.screen.query_one(Table)
    await until(pilot, lambda: name in table.keys)
    table.go(table.keys.index(name))


async def test_the_preview_shows_the_highlighted_run_and_what_differs_from_the_open_one(
    folder, running, until
):
    app = RlhfApp(folder, "frozen", now=lambda: 1_700_003_600.0, follow=False)
    async with running(app) as pilot:
        await pilot.press("1")
        await until(pilot, lambda: isinstance(app.screen, SessionsScreen))
        await highlight(pilot, until, app, "other")
        notes, newest = app.screen.query_one(PreviewNotes), app.screen.query_one(PreviewSamples)
        await until(pilot, lambda: "Settings unlike frozen" in notes.text())
        assert "reward.batch_size 8 (32)" in notes.text()
        assert "no alerts" in notes.text()
        app.draw_screens(only_live=False)  # the open session was read again
        assert "Newest responses, step 3" in newest.text()
        score, kl = (chart.text() for chart in app.screen.query(Chart))
        assert "score" in score
        assert "–" not in kl.splitlines()[0]  # it has a value

        await highlight(pilot, until, app, "frozen")
        await until(pilot, lambda: "Settings unlike the defaults" in notes.text())
        await highlight(pilot, until, app, "torn")
        await until(pilot, lambda: "torn/journal.db" in notes.text().replace("\n", ""))
        assert "file is not a database" in " ".join(notes.text().split())


def test_the_end_of_a_long_value_is_marked_as_cut():
    path = "/models/" + 20 * "long-" + "reward"
    preview = SessionPreview("run", differences=[Difference("reward.model", path, None)])
    notes = PreviewNotes()
    notes.read(make_state(), preview)
    shown = lines_of(notes.rows(100, 5))[2]
    assert shown.startswith(" reward.model …") and "long-reward (off)" in shown


def test_the_defaults_are_compared_although_the_reward_needs_another_section(folder):
    session = SessionFolder(folder / "frozen")
    scores = {
        "reward.model": "null",
        "reward.environment": "score",
        "environment.factory": "m:Game",
    }
    session.write_config(config_of(**scores))
    preview = read_preview(session, None)
    assert preview.problem == ""
    assert Difference("environment.factory", "m:Game", None) in preview.differences


async def test_a_preview_that_takes_longer_than_until_the_next_reading_of_the_list_is_shown(
    folder, running, until, monkeypatch
):
    begun, read, first, later = [], read_preview, threading.Event(), threading.Event()

    def slowly(session, other):  # as on a network file system
        begun.append(session.name)
        assert (first if len(begun) == 1 else later).wait(60)
        return read(session, other)

    monkeypatch.setattr(highlighted_preview, "read_preview", slowly)
    app = RlhfApp(folder, None, now=lambda: 1_700_003_600.0, follow=False)
    async with running(app, (180, 40)) as pilot:
        try:
            await until(pilot, lambda: begun)
            preview, rows = app.screen.preview, app.listing.rows(folder)
            (listed,) = [each for each in rows if each.row.name == begun[0]]
            changed = replace(listed, row=replace(listed.row, step=99))  # by a live run
            preview.ask(changed)
            await pilot.pause(2 * highlighted_preview.PREVIEW_DELAY)
            first.set()
            notes = app.screen.query_one(PreviewNotes)
            await until(pilot, lambda: "Settings unlike" in notes.text())
        finally:
            first.set()
            later.set()


async def test_a_configuration_that_cannot_be_read_hides_no_curves(folder, running, until):
    (folder / "other" / "config.yaml").write_text("model: [\n")
    app = RlhfApp(folder, None, now=lambda: 1_700_003_600.0, follow=False)
    async with running(app) as pilot:
        await highlight(pilot, until, app, "other")
        notes, newest = app.screen.query_one(PreviewNotes), app.screen.query_one(PreviewSamples)
        await until(pilot, lambda: "config.yaml,line2" in "".join(notes.text().split()))
        assert "Newest responses, step 3" in newest.text()
        assert all("cannot be read" not in chart.text() for chart in app.screen.query(Chart))


async def test_the_preview_is_beside_the_table_below_it_or_hidden_and_the_name_is_near_its_state(
    folder, running, until
):
    app = RlhfApp(folder, None, now=lambda: 1_700_003_600.0, follow=False)
    async with running(app, (200, 50)) as pilot:
        preview, table = app.screen.query_one("#preview"), app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 3)
        await until(pilot, lambda: preview.region.x >= table.region.right > 0)
        line = table.text().splitlines()[1]
        assert line.index("finished") - line.index(cells(table, 0)[1]) < 40
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: preview.region.y >= table.region.bottom)
        await pilot.resize_terminal(80, 24)  # below, because the list is short
        notes = app.screen.query_one(PreviewNotes)
        await until(pilot, lambda: notes.text() == " no alerts" and table.size.height == 6)
        assert app.screen.query_one(PreviewSamples).size.height > 3
        await pilot.resize_terminal(80, 21)
        await until(pilot, lambda: not preview.display)
        assert table.size.height > 12
