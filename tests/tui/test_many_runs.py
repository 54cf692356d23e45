"""Many runs at once: marked, overlaid and aligned, listed by any metric and by what differs."""

import contextlib
import threading
import time

import pytest

from engine.journal.database import ReadOnlyDatabase
from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import StepReport
from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.picker import PickerDialog, matches
from rlhf_tui.screens.sessions import SessionsScreen
from rlhf_tui.state.runs.differences import differing, short_names
from rlhf_tui.state.runs.listing import SessionListCache
from rlhf_tui.state.runs.overlay import Overlay, RunClock, aligned, read_clocks
from rlhf_tui.state.series import Series
from rlhf_tui.widgets.charts.grid import ChartGrid
from rlhf_tui.widgets.lines import Lines
from rlhf_tui.widgets.table import Table
from tests.tui.conftest import config_of
from tests.tui.screen import cells, notices, press_for

KL = "objective/kl"
NOW = 1_700_003_600.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three short runs, two of which have another clip range."""
    from tests.tui.conftest import make_session  # noqa: PLC0415 - the fixture of the same name

    root = tmp_path_factory.mktemp("many") / "sessions"
    for name, steps in (("base", 4), ("clip-1", 6), ("clip-2", 8)):
        session = make_session(root, name, steps)
        if name != "base":
            values = {"reward.batch_size": 8 * int(name[-1])}
            session.write_config(config_of(**{"train.steps": steps} | values))
    return root


@pytest.fixture
def browser(runs, running, until):
    """The sessions screen of the three runs."""

    async def listed(pilot, app):
        await until(pilot, lambda: app.screen.query_one(Table).count() == 3)
        return app.screen.query_one(Table)

    return lambda: RlhfApp(runs, None, now=lambda: NOW, follow=False), listed


@pytest.fixture
def queries(monkeypatch):
    """The queries that are made, each with the name of its thread."""
    made, rows = [], ReadOnlyDatabase.rows

    def count(self, query, values=()):
        made.append((threading.current_thread().name, query))
        return rows(self, query, values)

    monkeypatch.setattr(ReadOnlyDatabase, "rows", count)
    return made


# -- alignment -------------------------------------------------------------------------------------


def test_runs_are_aligned_by_what_their_clocks_had_come_to():
    curve = Series([(10, 1.0), (20, 2.0)])
    twice = RunClock([(10, 200.0), (20, 400.0)])
    overlay = Overlay("other", {KL: curve}, {"episode": twice})
    own = {"episode": RunClock([(10, 100.0), (20, 200.0)])}
    assert aligned(overlay, own, "step") == {KL: curve}
    by_episode = aligned(overlay, own, "episode")[KL]
    assert list(by_episode.steps) == [20.0, 40.0]  # the last one beyond the end of this run
    assert list(by_episode.values) == [1.0, 2.0]
    assert aligned(overlay, own, "hours") == {}


def test_the_hours_of_a_run_are_those_of_its_steps_and_not_of_its_pauses(root):
    clocks = read_clocks(SessionFolder(root / "frozen"))
    hours = clocks["hours"]
    assert hours.at(200) == pytest.approx(200 * 4.1, rel=0.02)
    assert hours.step_at(hours.at(50)) == pytest.approx(50)
    assert not clocks["episode"]  # this session has no such metric


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [("seed", ["lr-1-seed-1", "lr-2-seed-2"]), ("seed lr-2", ["lr-2-seed-2"]),
     (r"^lr-\d-seed-1$", ["lr-1-seed-1"]), ("base|seed-2", ["lr-2-seed-2", "base"]), ("(", [])],
)  # fmt: skip
def test_a_list_is_filtered_by_words_or_by_a_regular_expression(query, found):
    names = ["lr-1-seed-1", "lr-2-seed-2", "base"]
    assert [name for name in names if matches(query, name, name)] == found


async def test_all_runs_that_match_are_overlaid_and_aligned(runs, running, until, queries):
    app = RlhfApp(runs, "base", now=lambda: NOW, follow=False)
    async with running(app) as pilot:
        await press_for(pilot, PickerDialog, "O")
        await pilot.press(*"clip-[12]", "ctrl+a", "enter")
        await until(pilot, lambda: set(app.view.others) == {"clip-1", "clip-2"})
        chart = app.screen.query_one(ChartGrid).charts[0]
        legend = app.screen.query_one("#cursor").text()
        assert "a clip-1  b clip-2" in legend
        before = chart.plot().last
        await pilot.press("A", "A")
        await until(pilot, lambda: app.view.alignment == "hours")
        assert chart.plot().last == pytest.approx(before, rel=0.1)
        assert "overlay by hours" in app.screen.query_one(ChartGrid).charts[1].plot().note
        queries.clear()
        await pilot.press("g", "left", "right", "n", "plus", "0")
        made = [query for name, query in queries if name == threading.current_thread().name]
        assert made == []  # a key only paints; the thread that reads the journal may be at work
        await press_for(pilot, PickerDialog, "O")
        await pilot.press("ctrl+a", "enter")
        await until(pilot, lambda: not app.view.others)


async def test_long_names_are_told_apart_in_the_list_of_runs_to_overlay(
    session_maker, tmp_path, running, until
):
    root, swept = tmp_path / "sessions", f"sweep-{'x' * 70}-"
    for name in ("base", f"{swept}1", f"{swept}2"):
        session_maker(root, name, 1)
    app = RlhfApp(root, "base", now=lambda: NOW, follow=False)
    async with running(app, (80, 24)) as pilot:
        await press_for(pilot, PickerDialog, "O")
        first, second = (line.split() for line in app.screen.query_one(Table).text().splitlines())
        assert (first[-1][-3:], second[-1][-3:]) == ("x-1", "x-2")
        assert len(first[-1]) > 40
        await pilot.press("ctrl+a", "enter")
        await until(pilot, lambda: len(app.view.others) == 2)
        legend = app.screen.query_one("#cursor").text().splitlines()[-1]
        assert [word[-3:] for word in legend.split()] == [
            "lay", "a", "x-1", "b", "x-2", "O", "ges", "it",
        ]  # fmt: skip


async def test_marked_runs_are_overlaid_on_the_highlighted_one(browser, running, until):
    make, listed = browser
    app = make()
    async with running(app) as pilot:
        table = await listed(pilot, app)
        table.go(table.keys.index("base"))
        await pilot.press("O")
        await until(pilot, lambda: notices(app))
        assert "no other session is marked" in notices(app)[0]
        await pilot.press("M", *"^clip", "enter")
        await until(pilot, lambda: "2 sessions marked" in app.screen.query_one("#about").text())
        assert sum("▸" in line for line in table.text().splitlines()) == 2
        table.go(table.keys.index("base"))
        await pilot.press("O")
        await until(pilot, lambda: app.current_mode == "dashboard")
        await until(pilot, lambda: set(app.view.others) == {"clip-1", "clip-2"})
        assert app.session.name == "base"


# -- the table -------------------------------------------------------------------------------------


async def test_the_settings_that_differ_are_columns_by_which_the_list_is_sorted(
    browser, running, until, monkeypatch
):
    make, listed = browser
    app = make()
    async with running(app) as pilot:
        table = await listed(pilot, app)
        about = app.screen.query_one("#about", Lines)
        read, rows = threading.Event(), app.listing.rows

        def slowly(*args, **named):  # as of 300 sessions
            assert read.wait(60)
            return rows(*args, **named)

        monkeypatch.setattr(app.listing, "rows", slowly)
        await pilot.press("C")
        await until(pilot, lambda: "reading the settings of 3 sessions" in about.text())
        read.set()
        await until(pilot, lambda: "reading" not in about.text())
        await until(pilot, lambda: "reward.batch_size" in table.text().splitlines()[0])
        titles = [column.title for column in table.columns]
        assert "steps" in titles  # train.steps differs, too
        screen = app.screen
        assert isinstance(screen, SessionsScreen)
        while table.sorted_by != "reward.batch_size":
            await pilot.press("s")
        assert table.keys == ["base", "clip-2", "clip-1"]
        at = titles.index("reward.batch_size")
        assert [cells(table, i)[at] for i in range(3)] == ["32", "16", "8"]
        # Of the marked ones only what differs between them.
        await pilot.press("M", *"clip", "enter", "R")
        await until(pilot, lambda: table.keys[0] == "clip-1")


async def test_any_metric_is_listed_drawn_and_sorted_by(browser, running, until):
    make, listed = browser
    app = make()
    async with running(app) as pilot:
        table = await listed(pilot, app)
        await press_for(pilot, PickerDialog, "i")
        await pilot.press(*"entropy", "enter")
        await until(pilot, lambda: "entropy" in table.text().splitlines()[0])
        titles = [column.title for column in table.columns]
        value = titles.index("entropy")
        await until(pilot, lambda: all(cells(table, i)[value] != "–" for i in range(3)))
        while table.sorted_by != "entropy":
            await pilot.press("s")
        shown = [float(cells(table, i)[value]) for i in range(3)]
        assert shown == sorted(shown, reverse=True)
        assert app.preferences.listed_metric == "policy/entropy_avg"


def test_keys_have_their_last_part_as_title_where_that_says_enough():
    one = {"kl.beta": 0.1, "model.path": "a", "eval.steps": 1, "train.steps": 5, "ppo.epochs": 2}
    two = {"kl.beta": 0.2, "model.path": "b", "eval.steps": 2, "train.steps": 6, "ppo.epochs": 2}
    keys = differing([one, two])
    assert keys == ["kl.beta", "model.path", "eval.steps", "train.steps"]
    assert list(short_names(keys).values()) == ["beta", "model.path", "eval.steps", "train.steps"]


def test_live_sessions_keep_their_order_at_each_step(tmp_path, session_maker):
    cache, journals = SessionListCache(), []
    with contextlib.ExitStack() as stack:
        for name in ("first", "second"):
            session = session_maker(tmp_path, name, 4)
            stack.callback(session.acquire().release)
            session.write_engine("nowhere", "1")
            journal = stack.enter_context(contextlib.closing(JournalWriter(session)))
            journal.begin_attempt(4, fresh=False)
            journals.append(journal)
            # A start counts as activity, even if its steps are those of long ago.
            assert cache.rows(tmp_path)[0].row.updated == pytest.approx(time.time(), abs=600)
        for step, journal in enumerate(journals * 2, 5):
            journal.record_step(StepReport(step=step, metrics={}, samples=[], settings={}))
            assert [s.row.name for s in cache.rows(tmp_path)] == ["second", "first"]


def test_a_list_reads_each_session_in_a_few_queries_and_only_once(runs, queries):
    cache, here = SessionListCache(), threading.current_thread().name

    def made(**options) -> int:
        queries.clear()
        assert len(cache.rows(runs, **options)) == 3
        return sum(name == here for name, _ in queries)  # an app that ends may still be reading

    def none_any_more(**options) -> bool:
        # An app that ends closes its databases, which removes files of theirs: one more reading.
        return any(made(**options) == 0 for _ in range(3))

    assert 0 < made() <= 3 * 16
    assert none_any_more()
    assert made(metric=KL, settings=True) > 0
    assert none_any_more(metric=KL, settings=True)


async def test_a_folder_that_takes_longer_to_read_than_until_the_next_reading_is_listed(
    browser, running, monkeypatch
):
    make, listed = browser
    app = make()
    begun, rows, first, later = [], app.listing.rows, threading.Event(), threading.Event()

    def slowly(*args, **named):  # as on a network file system
        begun.append(1)
        assert (first if len(begun) == 1 else later).wait(60)
        return rows(*args, **named)

    monkeypatch.setattr(app.listing, "rows", slowly)
    async with running(app) as pilot:
        app.screen.read_sessions()
        first.set()
        try:
            await listed(pilot, app)
        finally:
            later.set()
