"""Time left of a step and of a run."""

import pytest

from rlhf_tui.state import time_left


def test_the_end_is_as_many_steps_away_as_are_left():
    assert time_left.until_end(10, 30, 2.5) == 50.0


def test_after_the_last_step_no_time_is_left():
    assert time_left.until_end(31, 30, 2.5) == 0.0


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "~12s"), (0.0, ""), (None, "")])
def test_about_says_nothing_where_nothing_is_known(seconds, words):
    assert time_left.about(seconds) == words


def test_the_mean_of_steps_follows_the_newest_by_a_tenth():
    mean = time_left.StepSeconds()
    assert mean.mean is None
    mean.add(10.0)
    mean.add(20.0)
    assert mean.mean == pytest.approx(11.0)
