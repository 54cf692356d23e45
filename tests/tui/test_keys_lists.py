"""The keys of samples and log, pressed on a frozen session."""

import contextlib
import threading

import pytest

from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens import log
from rlhf_tui.widgets.samples.judgement import key_of
from rlhf_tui.widgets.samples.sample_view import EXTREMES, SampleView
from rlhf_tui.widgets.status_lines import StatusLine
from rlhf_tui.widgets.table import Table
from tests.tui.screen import opened, press_for


@pytest.fixture
def samples(run_app, until):
    return lambda: opened(run_app, until, "3", 500)


def shown_samples(app):
    """What the journal holds of the answers in the table, from the top."""
    with JournalReader(app.session) as reader:
        rows = {key_of(row): row for row in reader.samples.newest()}
    return [rows[key] for key in app.screen.query_one(Table).keys]


async def test_the_response_under_the_cursor_is_read(samples, until):
    async with samples() as (app, pilot):
        reading, table = app.screen.query_one(SampleView), app.screen.query_one(Table)
        for key in (
            "j",
            "down",
            "k",
            "up",
            "G",
            "g",
            "pagedown",
            "pageup",
            "n",
            "N",
            "end",
            "home",
        ):
            await pilot.press(key)
            await until(pilot, lambda: key_of(reading.sample) == table.key)


async def test_s_sorts_by_each_column_and_r_turns_it(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("s")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.sorted_by == "score")
        rows = shown_samples(app)
        assert rows == sorted(rows, key=lambda r: -r.score)
        await pilot.press("r")
        await until(pilot, lambda: not table.descending)
        await pilot.press("s")
        await until(pilot, lambda: table.sorted_by == "KL")


@pytest.mark.parametrize("key", ["slash", "f"])
async def test_a_filter_narrows_the_table_and_esc_takes_it_away(samples, key, until):
    async with samples() as (app, pilot):
        await press_for(pilot, InputDialog, key)
        await pilot.press(*"score>2 kl<8", "enter")
        await until(
            pilot,
            lambda: (rows := shown_samples(app)) and all(r.score >= 2 and r.kl <= 8 for r in rows),
        )
        await pilot.press("escape")
        await until(pilot, lambda: app.screen.query_one(Table).count() == 500)


@pytest.mark.parametrize(
    ("forth", "back"), [("full_stop", "comma"), ("greater_than_sign", "less_than_sign")]
)
async def test_pages_are_turned(samples, forth, back, until):
    async with samples() as (app, pilot):
        table = app.screen.query_one(Table)
        first, about = table.keys[0], app.screen.query_one("#filter")
        assert "page 1  . next" in about.text()
        await pilot.press(forth)
        await until(pilot, lambda: table.keys[0] != first)
        assert "page 2  , previous" in about.text()
        await pilot.press(back)
        await until(pilot, lambda: table.keys[0] == first)


async def test_a_list_in_a_terminal_that_was_small_for_a_moment_shows_the_same_rows(samples, until):
    async with samples() as (app, pilot):
        table = app.screen.query_one(Table)
        table.go(6)
        before = table.size
        await pilot.resize_terminal(20, 5)
        await until(pilot, lambda: table.top == 6)
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: table.size == before)
        assert table.top == 0


async def test_v_shows_a_number_of_each_token(samples, until):
    async with samples() as (app, pilot):
        reading = app.screen.query_one(SampleView)
        await until(pilot, lambda: reading.arrays is not None, "the arrays")
        for mode in ("KL", "log-prob", "advantage", "value", "text"):
            await pilot.press("v")
            assert reading.mode == mode
            title = EXTREMES.get(mode, f"largest {mode}")
            assert (title in reading.text()) == (mode != "text")


async def test_enter_reads_and_z_reads_alone(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: app.screen.query_one(SampleView).has_focus)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen.query_one(Table).has_focus)
        await pilot.press("z")
        await until(pilot, lambda: not app.screen.query_one(Table).display)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen.query_one(Table).display)


async def test_how_to_resume_a_stopped_run_is_whole_on_every_screen_in_80_columns(
    session_maker, tmp_path, running, until
):
    session = session_maker(tmp_path, "mine", 254)
    with contextlib.closing(JournalWriter(session)) as journal:
        message = "stopped at once, nothing was saved"
        journal.set_meta(state="stopped", message=message, total_steps=100_000)
    async with running(RlhfApp(tmp_path, "mine", follow=False), size=(80, 24)) as pilot:
        for key in "2345":
            where = "" if key == "2" else " on screen 2"
            await pilot.press(key)
            await until(pilot, lambda: pilot.app.screen.query("#status"))
            line = pilot.app.screen.query_one("#status", StatusLine)
            await until(pilot, lambda line=line: message in line.text())
            assert line.text().rstrip().endswith(f"{message}; resume with r{where}")


async def test_the_log_is_searched(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("5")
        view = app.screen.query_one("#log")
        await until(pilot, lambda: view.count() == 303)
        await press_for(pilot, InputDialog, "slash")
        await pilot.press(*"step 29", "enter")
        await until(pilot, lambda: view.matching == "step 29")
        found = []
        for key in ("n", "n", "N", "N", "N"):
            found.append(view.lines[view.match].split()[2])
            await pilot.press(key)
        # The newest line in sight first, then from the oldest on, and back.
        assert found == ["299", "29", "290", "29", "299"]
        assert view.lines[view.match].split()[2] == "298"
        await pilot.press("g", "right")
        assert (view.top, view.shift) == (0, 20)
        await pilot.press("left", "G", "escape")
        assert view.shift == 0
        assert view.matching == ""
        assert view.lines[-1] == "weights: 100%"


async def test_a_narrow_log_shows_the_time_of_day_and_the_date_where_it_changes(run_app, until):
    lines = [
        "2026-11-28 23:59:58,001 INFO one", "a line without a time", "2026-11-28 23:59:59,002 two",
        "2026-11-29 00:00:01,003 three",
    ]  # fmt: skip
    async with run_app(size=(80, 24)) as (app, pilot):
        await pilot.press("5")
        view = app.screen.query_one("#log")
        await until(pilot, lambda: view.count() == 303)
        view.add(lines[:2], fresh=True)
        view.add(lines[2:], fresh=False)
        assert view.text().splitlines() == [
            " 2026-11-28 23:59:58 INFO one", " a line without a time", " 23:59:59 two",
            " 2026-11-29 00:00:01 three",
        ]  # fmt: skip
        await pilot.resize_terminal(120, 24)
        await until(pilot, lambda: view.size.width == 120)
        assert view.text().splitlines() == [f" {line}" for line in lines]


async def test_a_log_that_takes_longer_to_read_than_until_the_next_reading_is_shown(
    run_app, until, monkeypatch
):
    begun, read, first, later = [], log.read_part, threading.Event(), threading.Event()

    def slowly(*args):  # as on a network file system
        begun.append(1)
        assert (first if len(begun) == 1 else later).wait(60)
        return read(*args)

    monkeypatch.setattr(log, "read_part", slowly)
    async with run_app() as (app, pilot):
        await pilot.press("5")
        view = app.screen.query_one("#log")
        await until(pilot, lambda: begun)
        app.screen.read_more()
        first.set()
        try:
            await until(pilot, lambda: view.count() == 303)
        finally:
            later.set()


async def test_a_log_that_shows_its_end_still_does_in_a_terminal_of_another_height(run_app, until):
    async with run_app() as (app, pilot):
        await pilot.press("5")
        view = app.screen.query_one("#log")
        await until(pilot, lambda: view.count() == 303)
        for height in (12, 33):
            await pilot.resize_terminal(120, height)
            await until(pilot, lambda height=height: view.size.height == height - 4)
            view.add([f"a line at {height}"], fresh=False)
            assert view.top + view.page_size == view.count()
        await pilot.press("k")
        top = view.top
        view.add(["another line"], fresh=False)
        assert view.top == top


async def test_lines_that_a_long_log_drops_move_neither_what_is_read_nor_the_match(
    run_app, until, monkeypatch
):
    monkeypatch.setattr(log, "MAX_LINES", 303)
    async with run_app() as (app, pilot):
        await pilot.press("5")
        view = app.screen.query_one("#log")
        await until(pilot, lambda: view.count() == 303)
        view.go(100)
        view.match = 110
        read, found = view.lines[view.top], view.lines[view.match]
        view.add(["new"] * 50, fresh=False)
        assert (view.lines[view.top], view.lines[view.match]) == (read, found)
        view.add(["new"] * 70, fresh=False)
        assert (view.top, view.match) == (0, None)


@pytest.mark.parametrize(("most", "count"), [(303, " 303 lines"), (302, " the last 302 lines")])
async def test_the_log_says_when_it_shows_only_the_end(run_app, until, monkeypatch, most, count):
    monkeypatch.setattr(log, "MAX_LINES", most)
    async with run_app() as (app, pilot):
        await pilot.press("5")
        about = app.screen.query_one("#about")
        await until(pilot, lambda: about.text().startswith(count), about.text())
