"""The window of steps that all charts share."""

import pytest

from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate
from rlhf_tui.state.series import Series
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.viewport import Viewport, round_end


@pytest.fixture
def state():
    state = SessionState("x")
    state.take(SessionUpdate(head=SessionSummary("running", 500, 1000, {}, "", [], 1, "box")))
    return state


def test_the_whole_run_is_seen_at_first(state):
    first, last = Viewport().window(state)
    assert first == 1
    assert last >= 500


def test_the_right_end_moves_in_jumps_so_that_little_is_redrawn():
    ends = {round_end(step, 1000) for step in range(400, 500)}
    assert len(ends) <= 2


def test_the_right_end_never_lies_beyond_the_run():
    assert round_end(149, 150) == 150
    assert round_end(170, 150) >= 170


def test_zooming_in_without_a_crosshair_keeps_the_newest_step_in_sight(state):
    view = Viewport()
    for _ in range(4):
        view.zoom(state, 0.5)
    first, last = view.window(state)
    assert first < 500 <= last
    assert last - first < 100


def test_zooming_in_at_the_crosshair_keeps_it_in_sight(state):
    view = Viewport(cursor=120)
    for _ in range(4):
        view.zoom(state, 0.5)
    first, last = view.window(state)
    assert first <= 120 <= last


def run_on(state, step):
    head = SessionSummary("running", step, 1000, {}, "", [], 1, "box")
    state.take(SessionUpdate(head=head))


def test_zooming_around_a_step_follows_the_run_while_the_newest_one_is_in_sight(state):
    view = Viewport()
    view.zoom(state, 0.8, around=499)
    first, last = view.window(state)
    assert (499 - first) / (last - first) == pytest.approx(498 / 499, abs=0.01)
    run_on(state, 600)
    after = view.window(state)
    assert after[0] <= 600 <= after[1]
    assert after[1] - after[0] == last - first


def test_zooming_around_an_old_step_does_not_follow_the_run(state):
    view = Viewport()
    view.zoom(state, 0.8, around=100)
    before = view.window(state)
    run_on(state, 600)
    assert view.window(state) == before


def test_panning_back_to_the_newest_step_follows_the_run_again(state):
    view = Viewport()
    view.zoom(state, 0.25)
    view.pan(state, -0.5)
    view.pan(state, 0.5)
    run_on(state, 600)
    first, last = view.window(state)
    assert first <= 600 <= last


def test_zooming_out_ends_at_the_whole_run(state):
    view = Viewport()
    view.zoom(state, 0.5)
    for _ in range(3):
        view.zoom(state, 2.0)
    assert view.width is None


def test_a_longer_run_beside_it_can_be_zoomed_into(state):
    view = Viewport(others={"longer": {"objective/kl": Series([(1, 1.0), (9000, 2.0)])}})
    assert view.window(state) == (1, 9000)
    view.zoom(state, 0.5)
    first, last = view.window(state)
    assert last - first < 8999
    for _ in range(3):
        view.zoom(state, 2.0)
    assert view.window(state) == (1, 9000)


def test_panning_goes_back_and_forth_and_ends_at_the_run_s_ends(state):
    view = Viewport()
    view.zoom(state, 0.25)
    view.pan(state, -1.0)
    earlier = view.window(state)
    view.pan(state, 1.0)
    assert earlier[0] < view.window(state)[0]
    for _ in range(50):
        view.pan(state, -1.0)
    assert view.window(state)[0] >= 1


def test_the_crosshair_stays_within_the_run(state):
    view = Viewport()
    view.move(state, -1)
    assert view.cursor == 500
    view.move(state, 10_000)
    assert view.cursor == 500
    view.move(state, -10_000)
    assert view.cursor == 1
