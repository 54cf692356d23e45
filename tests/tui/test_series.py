"""Values over the steps, and what is asked of them."""

import math
import random

import pytest

from rlhf_tui.state.series import BLOCK_POINTS, Series, Smoothed


@pytest.fixture
def walk():
    rng = random.Random(1)  # noqa: S311 - no secret
    return [(step, rng.gauss(0, 1)) for step in range(1, 10 * BLOCK_POINTS + 7)]


def test_extremes_are_those_of_the_values_wherever_the_slice_lies(walk):
    series = Series(walk)
    rng = random.Random(2)  # noqa: S311 - no secret
    for _ in range(300):
        first = rng.randrange(len(walk) - 1)
        end = rng.randrange(first + 1, len(walk) + 1)
        part = [v for _, v in walk[first:end]]
        assert series.extremes(first, end) == (min(part), max(part))


def test_extremes_hold_when_the_series_grew_in_pieces(walk):
    grown = Series()
    for i in range(0, len(walk), 37):
        grown.extend(walk[i : i + 37])
    assert grown.extremes(0, len(walk)) == Series(walk).extremes(0, len(walk))
    assert grown.values == Series(walk).values


def test_undefined_values_are_left_out():
    series = Series([(1, 1.0), (2, None), (3, math.nan), (4, 2.0)])
    assert list(series.steps) == [1, 4]
    assert series.at(2) is None


def test_the_last_value_is_the_newest_step_s_or_none():
    series = Series([(1, 1.0), (2, None)])
    assert series.last is None
    series.extend([(3, math.nan)])
    assert series.last is None
    series.extend([(4, 2.0)])
    series.extend([])
    assert series.last == 2.0


def test_the_mean_covers_the_steps_that_are_there():
    series = Series([(1, 1.0), (2, 3.0), (5, 9.0)])
    assert series.mean(1, 4) == 2.0
    assert series.mean(3, 4) is None


def test_a_moving_average_that_follows_equals_one_made_at_once(walk):
    source = Series(walk[:100])
    following = Smoothed(source, 0.9)
    source.extend(walk[100:])
    following.follow()
    assert following.values == Smoothed(Series(walk), 0.9).values
    assert following.values[0] == walk[0][1]
