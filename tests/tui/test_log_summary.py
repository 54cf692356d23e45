"""Below the log on a large terminal: its warnings and errors, the attempts, what happened."""

import pytest

from rlhf_tui.app.app import RlhfApp
from rlhf_tui.screens.log import LogView
from rlhf_tui.widgets.panels.log_summary import LogSummary, Problems, line_tone
from rlhf_tui.widgets.scroll_list import marked
from tests.tui.panels import FIRST, make_state, text

LOG = """\
2026-11-28 10:00:00,001 INFO load policy
2026-11-28 10:00:01,001 WARNING refused a connection
2026-11-28 10:00:02,001 ERROR rank 1 ends
Traceback (most recent call last):
  File "worker.py", line 1, in <module>
    train()
ValueError: no score
a line of another program
UserWarning: it is slow
2026-11-28 10:00:09,001 WARNING refused a connection
""".splitlines()


@pytest.fixture
def logged(session_maker, tmp_path):
    """The app on a session with a log."""

    def make(lines):
        session_maker(tmp_path, "mine", 100).log_file.write_text("\n".join(lines) + "\n")
        return RlhfApp(tmp_path, "mine", follow=False)

    return make


def problems_of(lines):
    problems = Problems()
    problems.add(lines)
    return problems.newest_first()


def test_warnings_and_errors_are_listed_once_with_their_number_and_last_time():
    found = [(p.text, p.count, p.last[-8:]) for p in problems_of(LOG)]
    assert found == [
        ("refused a connection", 2, "10:00:09"),
        ("UserWarning: it is slow", 1, "10:00:02"),
        ("ValueError: no score", 1, "10:00:02"),
        ("rank 1 ends", 1, "10:00:02"),
    ]


@pytest.mark.parametrize(
    ("line", "tone"),
    [
        (f"{LOG[0]}, without an error", ""), (LOG[1], "warn"), (LOG[2], "bad"),
        ("2026-11-28 10:00:00,001 a line of an earlier version with an error", "bad"),
        ("RuntimeError: none", "bad"), ("a warning of a library", "warn"), ("step 7", ""),
    ],
)  # fmt: skip
def test_the_level_of_a_line_decides_its_tone_or_else_its_words(line, tone):
    assert line_tone(line) == tone


def test_the_time_and_a_usual_level_of_a_line_are_less_bright_than_its_text():
    view = LogView()
    view.add(LOG, fresh=True)
    assert view.row(0, 120) == [(" ", ""), (f"{LOG[0][:29]}", "dim"), ("load policy", "")]
    assert view.row(0, 80) == [(" ", ""), ("2026-11-28 10:00:00 INFO ", "dim"), ("load policy", "")]
    assert "dim" not in {tone for text, tone in view.row(1, 120) if text}
    view.shift = 34
    assert [text for text, _ in view.row(0, 120)] == [" ", "", "policy"]


def test_a_search_finds_words_that_are_partly_in_the_less_bright_beginning():
    assert marked([("10:00 INFO ", "dim"), ("load policy", "")], "info load") == [
        ("10:00 ", "dim"), ("INFO load", "match"), (" policy", ""),
    ]  # fmt: skip


def test_a_traceback_that_arrives_in_two_parts_is_one_error():
    problems = Problems()
    problems.add(LOG[:5])
    problems.add(LOG[5:])
    assert problems.newest_first() == problems_of(LOG)


def test_the_newest_attempts_stay_in_sight_below_many_problems():
    attempts = [FIRST, FIRST]
    summary = LogSummary(make_state(attempts=attempts))
    summary.show_problems(problems_of(f"{LOG[0][:24]}ERROR problem {i}" for i in range(30)))
    shown = text(summary, 100, 8)
    assert "problem 29" in shown
    assert "27 earlier" in shown
    assert shown.count("supervisor 77 on box") == 2


def test_a_long_warning_is_whole_if_there_is_room_for_its_lines():
    words = [f"word{i}" for i in range(15)]
    summary = LogSummary(make_state(attempts=[FIRST]))
    summary.show_problems(problems_of([f"{LOG[0][:24]}WARNING {' '.join(words)}"]))
    shown = text(summary, 80, summary.wanted(80))
    assert all(word in shown for word in words)
    assert "supervisor 77 on box" in shown
    low = text(summary, 80, 4).splitlines()
    assert ["Attempts" in line for line in low] == [False, False, True, False]


@pytest.mark.parametrize(("size", "visible"), [((80, 24), False), ((120, 40), True)])
async def test_the_summary_takes_the_room_that_a_log_leaves(logged, running, until, size, visible):
    app = logged(LOG)
    async with running(app, size=size) as pilot:
        await pilot.press("5")
        view, summary = app.screen.query_one(LogView), app.screen.query_one(LogSummary)
        await until(pilot, lambda: view.count() == len(LOG))
        await until(pilot, lambda: summary.display == visible)
        assert view.size.height >= len(LOG)
        if visible:
            await until(pilot, lambda: "2× refused a connection" in summary.text())
            assert "What happened" in summary.text()


async def test_a_long_log_leaves_the_summary_a_few_lines(logged, running, until):
    app = logged(LOG * 50)
    async with running(app, size=(120, 40)) as pilot:
        await pilot.press("5")
        view, summary = app.screen.query_one(LogView), app.screen.query_one(LogSummary)
        await until(pilot, lambda: view.count() == 50 * len(LOG) and summary.display)
        await until(pilot, lambda: summary.size.height == 8)
        assert view.top == view.count() - view.size.height, "the end of the log is in sight"
