"""The window of steps that all charts share."""

import pytest

from rlhf_tui.news import Head, News
from rlhf_tui.widgets.book import Book
from rlhf_tui.widgets.series import Series
from rlhf_tui.widgets.view import View, round_end


@pytest.fixture
def book():
    book = Book("x")
    book.take(News(head=Head("running", 500, 1000, {}, "", [], 1, "box")))
    return book


def test_the_whole_run_is_seen_at_first(book):
    first, last = View().window(book)
    assert first == 1
    assert last >= 500


def test_the_right_end_moves_in_jumps_so_that_little_is_redrawn():
    ends = {round_end(step, 1000) for step in range(400, 500)}
    assert len(ends) <= 2


def test_the_right_end_never_lies_beyond_the_run():
    assert round_end(149, 150) == 150
    assert round_end(170, 150) >= 170


def test_zooming_in_without_a_crosshair_keeps_the_newest_step_in_sight(book):
    view = View()
    for _ in range(4):
        view.zoom(book, 0.5)
    first, last = view.window(book)
    assert first < 500 <= last
    assert last - first < 100


def test_zooming_in_at_the_crosshair_keeps_it_in_sight(book):
    view = View(cursor=120)
    for _ in range(4):
        view.zoom(book, 0.5)
    first, last = view.window(book)
    assert first <= 120 <= last


def test_zooming_out_ends_at_the_whole_run(book):
    view = View()
    view.zoom(book, 0.5)
    for _ in range(3):
        view.zoom(book, 2.0)
    assert view.width is None


def test_a_longer_run_beside_it_can_be_zoomed_into(book):
    view = View(others={"longer": {"objective/kl": Series([(1, 1.0), (9000, 2.0)])}})
    assert view.window(book) == (1, 9000)
    view.zoom(book, 0.5)
    first, last = view.window(book)
    assert last - first < 8999
    for _ in range(3):
        view.zoom(book, 2.0)
    assert view.window(book) == (1, 9000)


def test_panning_goes_back_and_forth_and_ends_at_the_run_s_ends(book):
    view = View()
    view.zoom(book, 0.25)
    view.pan(book, -1.0)
    earlier = view.window(book)
    view.pan(book, 1.0)
    assert earlier[0] < view.window(book)[0]
    for _ in range(50):
        view.pan(book, -1.0)
    assert view.window(book)[0] >= 1


def test_the_crosshair_stays_within_the_run(book):
    view = View()
    view.move(book, -1)
    assert view.cursor == 500
    view.move(book, 10_000)
    assert view.cursor == 500
    view.move(book, -10_000)
    assert view.cursor == 1
